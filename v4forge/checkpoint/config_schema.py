"""config.json field by field: what each setting may be. What two settings are to each other is layout's.

A setting is here because the forward pass, the layout or the quantization reads it, or because it would change the
model and nothing here computes it: then the one value that changes nothing is all it may be. A setting of neither kind
is refused by name, for it may be of the second; those that no computation of this model reads are listed, in UNREAD.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

COMPRESS_RATIOS = {0: "sliding window", 4: "CSA", 128: "HCA"}
FAULTS_SHOWN = 3
VALUE_SHOWN = 80  # characters
PINNED = "use the first release of DeepSeek-V4-Flash (FLASH_REVISION in versions.env)"

POSITIVE = "a positive integer"
NUMBER = "a positive number"
Size = Annotated[int, Field(gt=0, le=1 << 20, description=POSITIVE)]
Positions = Annotated[int, Field(gt=0, le=1 << 40, description=POSITIVE)]
Few = Annotated[int, Field(gt=0, le=4096, description=POSITIVE)]  # of these there are loops
Epsilon = Annotated[float, Field(gt=0, lt=1, description="a positive number below 1")]
Factor = Annotated[float, Field(gt=0, le=1e30, description=NUMBER)]
TokenId = Annotated[int, Field(ge=0, description="a token id")]
One = Annotated[int, Field(ge=1, le=1)]
Zero = Annotated[int, Field(ge=0, le=0)]


def _refused(value: bool, wanted: bool) -> bool:
    if value is not wanted:
        raise ValueError(wanted)
    return value


# Not Literal: that takes 0 for false and 1.0 for 1.
Off = Annotated[
    bool,
    AfterValidator(lambda value: _refused(value, False)),
    Field(description="false: nothing here computes it"),
]
On = Annotated[
    bool,
    AfterValidator(lambda value: _refused(value, True)),
    Field(description="true: nothing here computes anything else"),
]


class Part(BaseModel):
    """An object of settings: those named, each of its type, and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)


class Yarn(Part):
    """The rope scaling of layers with a compressor, https://arxiv.org/abs/2309.00071."""

    type: Literal["yarn"]
    rope_type: Literal["yarn"] = "yarn"  # the same, as transformers calls it
    factor: Annotated[float, Field(ge=1, le=1e6, description="a number from 1 on")]
    original_max_position_embeddings: Positions
    beta_fast: Annotated[float, Field(gt=0, le=1e6, description=NUMBER)]
    beta_slow: Annotated[float, Field(gt=0, le=1e6, description=NUMBER)]


class BlockFp8(Part):
    """How upstream's attention is stored: FP8 by blocks, with power-of-two scales."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"]
    scale_fmt: Literal["ue8m0"]
    weight_block_size: Annotated[
        list[Annotated[int, Field(ge=128, le=128)]], Field(min_length=2, max_length=2, description="[128, 128]")
    ]
    activation_scheme: Literal["dynamic"] = "dynamic"


class Shape(Part):
    """What decides which tensors there are, and of which shape."""

    vocab_size: Annotated[int, Field(gt=0, le=1 << 24, description=POSITIVE)]
    hidden_size: Size
    moe_intermediate_size: Size
    num_hidden_layers: Few
    num_attention_heads: Size
    head_dim: Size
    q_lora_rank: Size
    o_lora_rank: Size
    o_groups: Size
    n_routed_experts: Few
    num_experts_per_tok: Few
    num_hash_layers: Annotated[int, Field(ge=0, description=POSITIVE)]
    index_n_heads: Size
    index_head_dim: Size
    hc_mult: Few
    compress_ratios: Annotated[
        list[Annotated[int, Field(ge=0)]],
        Field(description=f"a list with one of {sorted(COMPRESS_RATIOS)} a layer"),
    ]


class Saved(Shape):
    """What is read of a config.json that is none of ours: transformers writes settings that upstream has not."""

    model_config = ConfigDict(extra="ignore")


class Forward(Shape):
    """What the layers of `transformers` are made from, and are given: nothing else of config.json reaches them."""

    qk_rope_head_dim: Size
    sliding_window: Size
    index_topk: Size
    hc_sinkhorn_iters: Few
    hc_eps: Epsilon
    rms_norm_eps: Epsilon
    rope_theta: Factor
    compress_rope_theta: Annotated[float, Field(gt=1, le=1e30, description="a number above 1")]
    rope_scaling: Annotated[Yarn, Field(description="an object of YaRN's settings")]
    max_position_embeddings: Positions
    routed_scaling_factor: Factor
    swiglu_limit: Factor
    scoring_func: Literal["sqrtsoftplus"]
    hidden_act: Literal["silu"]


class Upstream(Forward):
    """A config.json of DeepSeek-V4 with FP4 experts and one MTP block, but for what UNREAD lists."""

    model_type: Literal["deepseek_v4"]
    architectures: list[Literal["DeepseekV4ForCausalLM"]]
    expert_dtype: Literal["fp4"]
    topk_method: Literal["noaux_tc"]
    norm_topk_prob: On
    n_shared_experts: Annotated[One, Field(description="1: one shared expert a layer is what is computed")]
    num_key_value_heads: Annotated[One, Field(description="1: all queries share the one head")]
    num_nextn_predict_layers: Annotated[One, Field(description="1: only one MTP block is supported")]
    tie_word_embeddings: Off = False
    attention_bias: Off = False
    mlp_bias: Off = False
    attention_dropout: Annotated[float, Field(ge=0, le=0, description="0: nothing here computes it")] = 0.0
    first_k_dense_replace: Annotated[Zero, Field(description="0: every layer has experts")] = 0
    moe_layer_freq: Annotated[One, Field(description="1: every layer has experts")] = 1
    n_group: Annotated[One, Field(description="1: nothing here routes by groups")] = 1
    topk_group: Annotated[One, Field(description="1: nothing here routes by groups")] = 1
    torch_dtype: Literal["bfloat16"] = "bfloat16"
    dtype: Literal["bfloat16"] = "bfloat16"
    bos_token_id: TokenId = 0
    eos_token_id: Annotated[TokenId | list[TokenId], Field(description="a token id, or a list of them")] = 1
    quantization_config: Annotated[BlockFp8, Field(description="an object: FP8 by blocks of 128 x 128")]


# Settings that say where a file comes from, how text is generated or a model is trained: no tensor depends on them.
UNREAD = re.compile(
    r"_.*|transformers_version|auto_map|use_cache|initializer_range|output_\w+|return_dict(_in_generate)?|torchscript"
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|num_return_sequences|top_[kp]|typical_p"
    r"|temperature|repetition_penalty|length_penalty|no_repeat_ngram_size|bad_words_ids|forced_[be]os_token_id"
    r"|pad_token_id|id2label|label2id|problem_type|finetuning_task|task_specific_params|tokenizer_class|prefix|chunk_size_feed_forward"
    r"|router_aux_loss_coef|router_jitter_noise|aux_loss_alpha|seq_aux|ep_size|hidden_dropout|is_(encoder_)?decoder"
)
# What the settings of other releases and forms are.
KNOWN_ELSEWHERE = (
    (r"dspark_\w+", "is a setting of another release, -0731 or Pro-0813, whose drafts are no MTP block"),
    (r"text_config|vision_config|engram_\w+", "is a setting of another architecture, DeepSeek-V4.1"),
    (
        r"(mlp_)?layer_types|compress_rate\w*|rope_parameters|partial_rotary_factor|num_local_experts|intermediate_size",
        "is a setting of the form that transformers writes, not of upstream's",
    ),
)

# What is taken for granted of an artifact, until verify's checks "config resolves" and "config kept".
VERIFIED: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128] * 2},
    "topk_method": "noaux_tc",
}


def faults(raw: Mapping[str, Any], form: str) -> tuple[str, str] | None:
    """What is wrong with the settings of a config.json, and the hint; None for none.

    `form` is "source" or "artifact": of an artifact, what verify has a check of its own for is not looked at. Of what
    another tool has "saved" only the shapes are.
    """
    read = _read(raw) | (VERIFIED if form == "artifact" else {})
    try:
        (Saved if form == "saved" else Upstream).model_validate(read)
    except ValidationError as error:
        told = list(_told(read, error.errors()))
        more = f"; and {len(told) - FAULTS_SHOWN} more" if len(told) > FAULTS_SHOWN else ""
        return "; ".join(fact for fact, _ in told[:FAULTS_SHOWN]) + more, told[0][1]
    return None


def forward(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of Forward of a checked config.json, each of the type that transformers asks for."""
    return Forward.model_validate({name: raw[name] for name in Forward.model_fields}).model_dump()


def _read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are looked at. None is no setting where one may be left out; a name may be no text."""
    required = {name for name, field in Upstream.model_fields.items() if field.is_required()}
    found = {_escaped(name): value for name, value in raw.items()}
    return {
        name: {_escaped(key): each for key, each in value.items()} if isinstance(value, dict) else value
        for name, value in found.items()
        if not UNREAD.fullmatch(name) and not (value is None and name not in required)
    }


def _escaped(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()


def _told(raw: Mapping[str, Any], errors: list[ErrorDetails]) -> Iterator[tuple[str, str]]:
    """A fact and a hint for what is missing, then for each setting at fault, once."""
    by_place = {_place(each["loc"]): each for each in reversed(errors)}
    faults = dict(reversed(by_place.items()))
    if missing := [repr(".".join(place)) for place, error in faults.items() if error["type"] == "missing"]:
        more = f" and {len(missing) - FAULTS_SHOWN} more" if len(missing) > FAULTS_SHOWN else ""
        yield f"no {', '.join(missing[:FAULTS_SHOWN])}{more}: this is not DeepSeek-V4's upstream config", PINNED
    for place, error in faults.items():
        if error["type"] != "missing":
            yield _fault(".".join(place), _value(raw, place), error)


def _place(loc: tuple[str | int, ...]) -> tuple[str, ...]:
    """The names of pydantic's `loc`, without the numbers within lists and the kinds of a union."""
    inner = Yarn if loc[0] == "rope_scaling" else BlockFp8 if loc[0] == "quantization_config" else None
    return tuple(map(str, loc[: 2 if inner else 1]))


def _value(raw: Mapping[str, Any], place: tuple[str, ...]) -> Any:
    value: Any = raw
    for name in place:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _fault(name: str, value: Any, error: ErrorDetails) -> tuple[str, str]:
    if error["type"] == "extra_forbidden":
        if what := next((what for pattern, what in KNOWN_ELSEWHERE if re.fullmatch(pattern, name)), ""):
            return f"{shown(name)} {what}", PINNED
        fact = f"{shown(name)} is a setting that nothing here computes"
        return fact, "leave it out of config.json if the model is the same without it"
    fact = f"{name} is {shown(value)}"
    if name == "expert_dtype" and value == "fp8":
        return f"{fact}, that is the Base release: it must be 'fp4'", PINNED
    if error["type"] == "less_than_equal" and _description(name) == POSITIVE:
        return f"{fact}, it must be at most {error['ctx']['le']:,}", PINNED
    return f"{fact}, it must be {_description(name) or _words(error)}", PINNED


def _description(name: str) -> str:
    model: Any = Upstream
    for part in name.split("."):
        field = model.model_fields[part]
        model = field.annotation
    return field.description or ""


def _words(error: ErrorDetails) -> str:
    expected = error.get("ctx", {}).get("expected")
    return f"{expected}" if expected else error["msg"].removeprefix("Input should be ")


def shown(value: Any) -> str:
    """A value as a message has it: short, and in characters that any terminal takes."""
    try:
        text = ascii(value)
    except RecursionError:
        text = "nested too deeply"
    return text if len(text) <= VALUE_SHOWN else f"{text[:VALUE_SHOWN]}…"
