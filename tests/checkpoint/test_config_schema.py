"""config.json field by field: what is refused, by name, and what must not be."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import OTHER, SMALL, TINY, config_dict

from v4forge.checkpoint import config_schema, layout
from v4forge.errors import UserError
from v4forge.model import deepseek_v4
from v4forge.model.layer_classes import hf, unfilled
from v4forge.pipeline import requirements

# The sizes of DeepSeek-V4-Pro, of its public config: another size of the same model.
PRO: dict[str, Any] = {
    "compress_ratios": [128, 128, *([4, 128] * 29), 4, 0],
    "head_dim": 512,
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "o_groups": 16,
    "o_lora_rank": 1024,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
}
FLASH = json.loads(requirements.FLASH_CONFIG.read_text())
YARN = config_dict()["rope_scaling"]
FP8 = config_dict()["quantization_config"]


def refusal(raw: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        layout.parse_config(raw, "config.json")
    assert caught.value.fact.startswith("config.json: ") and caught.value.hint
    return caught.value


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    # what gave a traceback, in the forward pass or in transformers
    "no limit": ({"swiglu_limit": None}, "swiglu_limit is None, it must be a positive number"),
    "a limit as text": ({"swiglu_limit": "10.0"}, "swiglu_limit is '10.0', it must be a positive number"),
    "a limit that is infinite": ({"swiglu_limit": float("inf")}, "swiglu_limit is inf"),
    "another score": ({"scoring_func": "softmax"}, "scoring_func is 'softmax', it must be 'sqrtsoftplus'"),
    "another rope": ({"rope_scaling": YARN | {"type": "linear"}}, "rope_scaling.type is 'linear', it must be 'yarn'"),
    "no rope scaling": ({"rope_scaling": None}, "rope_scaling is None, it must be an object"),
    "rope of nothing": ({"rope_scaling": {}}, "no 'rope_scaling.type', 'rope_scaling.factor'"),
    "a factor as text": ({"rope_scaling": YARN | {"factor": "16"}}, "rope_scaling.factor is '16'"),
    "no turns": ({"rope_scaling": YARN | {"beta_slow": 0}}, "rope_scaling.beta_slow is 0, it must be a positive"),
    "turns upside down": ({"rope_scaling": YARN | {"beta_fast": 1}}, "rope_scaling.beta_fast is 1, not more than"),
    "rope with more": ({"rope_scaling": YARN | {"mscale": 2.0}}, "'rope_scaling.mscale' is a setting that nothing"),
    "theta of one": ({"compress_rope_theta": 1}, "compress_rope_theta is 1, it must be a number above 1"),
    "layer types": ({"layer_types": ["full_attention"] * 3}, "'layer_types' is a setting of the form that transf"),
    "rates": ({"compress_rate_csa": 8}, "'compress_rate_csa' is a setting of the form that transformers"),
    "an epsilon as text": ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    "no steps": ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters is 0"),
    "an odd rope": ({"qk_rope_head_dim": 15}, "qk_rope_head_dim 15 is not divisible by 2"),
    "a rope wider than heads": ({"qk_rope_head_dim": 128}, "qk_rope_head_dim is 128, more than head_dim, 64"),
    "a rope wider than the indexer's": ({"index_head_dim": 8}, "qk_rope_head_dim is 16, more than index_head_dim, 8"),
    "too many experts": ({"n_routed_experts": 10**9}, "n_routed_experts is 1000000000, it must be at most 4,096"),
    "a token that is none": ({"eos_token_id": 64}, "eos_token_id is 64, the vocabulary ends at 63"),
    "a token as text": ({"bos_token_id": "0"}, "bos_token_id is '0', it must be a token id"),
    # what was calibrated to the end although nothing computes it
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is True, it must be false"),
    "two shared experts": ({"n_shared_experts": 2}, "n_shared_experts is 2, it must be 1"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', it must be 'silu'"),
    "attention with biases": ({"attention_bias": True}, "attention_bias is True, it must be false"),
    "experts with biases": ({"mlp_bias": True}, "mlp_bias is True, it must be false"),
    "eight heads of keys": ({"num_key_value_heads": 8}, "num_key_value_heads is 8, it must be 1"),
    "weights as they are": ({"norm_topk_prob": False}, "norm_topk_prob is False, it must be true"),
    "another choice of experts": ({"topk_method": "greedy"}, "topk_method is 'greedy', it must be 'noaux_tc'"),
    "routing by groups": ({"n_group": 8}, "n_group is 8, it must be 1"),
    "dense layers": ({"first_k_dense_replace": 3}, "first_k_dense_replace is 3, it must be 0"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1, it must be 0"),
    "FP16": ({"torch_dtype": "float16"}, "torch_dtype is 'float16', it must be 'bfloat16'"),
    "one that is true": ({"n_shared_experts": True}, "n_shared_experts is True, it must be 1"),
    "a width by another name": ({"intermediate_size": 64}, "'intermediate_size' is a setting of the form that"),
    "a setting of tomorrow": ({"attn_logit_cap": 30.0}, "'attn_logit_cap' is a setting that nothing here computes"),
    "a list of lists": ({"foo": json.loads("[" * 500 + "]" * 500)}, "'foo' is a setting that nothing here computes"),
    "a factor of lists": ({"hc_mult": json.loads("[" * 500 + "]" * 500)}, "hc_mult is [[["),
    "objects of objects": ({"rope_scaling": json.loads('{"a":' * 500 + "1" + "}" * 500)}, "rope_scaling.factor"),
    "a name that is no text": ({"\ud83d": 1}, "is a setting that nothing here computes"),
    "BF16 as a source": ({"quantization_config": None}, "quantization_config is None, it must be an object"),
    "another block": (
        {"quantization_config": FP8 | {"weight_block_size": [64, 64]}},
        "quantization_config.weight_block_size is [64, 64], it must be [128, 128]",
    ),
    "an artifact as a source": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        "quantization_config.quant_method is 'compressed-tensors', it must be 'fp8'",
    ),
    "F32 scales": ({"quantization_config": FP8 | {"scale_fmt": "float"}}, "quantization_config.scale_fmt is 'float'"),
    # other releases
    "Base": ({"expert_dtype": "fp8"}, "expert_dtype is 'fp8', that is the Base release: it must be 'fp4'"),
    "-0731": ({"dspark_block_size": 5}, "'dspark_block_size' is a setting of another release, -0731"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_setting_that_nothing_computes_is_refused_by_name(what: str) -> None:
    changes, fact = REFUSED[what]
    assert fact in refusal(config_dict() | changes).fact


@pytest.mark.parametrize(
    "name", sorted(name for name, f in config_schema.Upstream.model_fields.items() if f.is_required())
)
@pytest.mark.parametrize("value", [None, "x", [], {}, -1, True, float("nan"), "missing"])
def test_every_setting_that_must_be_there_is_of_its_type(name: str, value: Any) -> None:
    if name == "norm_topk_prob" and value is True:
        return
    raw = config_dict() | {name: value}
    if value == "missing":
        del raw[name]
    assert name in refusal(raw).fact


FINE: dict[str, dict[str, Any]] = {
    "the pinned release": FLASH,
    "models/tiny": json.loads((TINY / "config.json").read_text()),
    "the tests' small": config_dict(**SMALL),
    "the tests' other": config_dict(**{name: value for name, value in OTHER.items() if name != "shards"}),
    "Pro": config_dict(**PRO),
    "whole numbers where fractions are": config_dict(swiglu_limit=10, attention_dropout=0, routed_scaling_factor=2),
    "fractions where whole numbers are": config_dict(rope_theta=10000.0, compress_rope_theta=160000.0),
    "saved by transformers": config_dict(
        transformers_version="5.0.0", use_cache=False, pad_token_id=None, dtype="bfloat16"
    ),
    "with nothing said": config_dict(layer_types=None, n_group=None, attention_bias=None, _name_or_path="a/b"),
    "several ends": config_dict(eos_token_id=[1, 2]),
}


@pytest.mark.parametrize("what", FINE)
def test_a_model_that_is_computed_is_not_refused(what: str) -> None:
    layout.parse_config(FINE[what], what)


@pytest.mark.parametrize(
    "name", ["attention_bias", "attention_dropout", "tie_word_embeddings", "use_cache", "torch_dtype"]
)
def test_a_setting_may_be_left_out_where_that_says_the_same(name: str) -> None:
    raw = config_dict()
    del raw[name]
    layout.parse_config(raw, "config.json")


def test_an_artifacts_config_is_read_too() -> None:
    raw = config_dict(quantization_config={"quant_method": "compressed-tensors"})
    assert layout.parse_config(raw, "config.json", "artifact").raw is raw


def test_several_faults_are_told_together() -> None:
    fact = refusal(config_dict(swiglu_limit=None, hidden_act="gelu", hc_eps="x", scoring_func=1, foo=1)).fact
    assert fact.count(";") == 3 and fact.endswith("; and 2 more")


def test_a_setting_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(config_dict())
    (tmp_path / "config.json").write_text('{"hidden_size": 256, ' + text[1:])
    with pytest.raises(UserError, match="'hidden_size' is there twice"):
        layout.load_config(tmp_path)


@pytest.mark.parametrize("name", ["foo", "auto_map", "rope_scaling"])
@pytest.mark.parametrize("depth", [500, 990, 100_000])
def test_a_setting_that_is_nested_however_deep_is_refused_or_kept(tmp_path: Path, name: str, depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    (tmp_path / "config.json").write_text(f'{{"{name}": {nested}, ' + json.dumps(config_dict(rope_scaling=YARN))[1:])
    try:
        json.dumps(layout.load_config(tmp_path).raw, indent=1)
    except UserError as error:
        assert error.fact.startswith(f"{tmp_path / 'config.json'}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_config_in_any_encoding_of_json_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_dict()), encoding=encoding)
    assert layout.load_config(tmp_path).hidden_size == SMALL["hidden_size"]


def test_nothing_but_checked_settings_reaches_the_layers() -> None:
    raw = config_dict(_attn_implementation="flash", router_jitter_noise=0.5, transformers_version="9")
    made = deepseek_v4.hf_config(layout.parse_config(raw, "config.json"))
    assert made.router_jitter_noise == 0.0 and made._attn_implementation == deepseek_v4.ATTENTION


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 300)
    | st.sampled_from([10**400, 2**31, 2**63, -1, 128, 4096])
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["\ud83d", "silu", "yarn", "fp8", "4", "true", ""]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from([*config_dict(), *config_schema.Upstream.model_fields, "layer_types", "rope_parameters"])
INNER = st.sampled_from([*YARN, *FP8, "mscale", "rope_type"])


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """A good config.json with some settings, or some within its two objects, replaced, added or removed."""
    raw = deepcopy(
        draw(st.sampled_from([config_dict(), config_dict(**{k: v for k, v in OTHER.items() if k != "shards"})]))
    )
    for _ in range(draw(st.integers(1, 3))):
        name = draw(NAMES | st.text(max_size=8))
        if draw(st.booleans()):
            raw.pop(name, None)
        else:
            raw[name] = draw(JSON)
    if draw(st.booleans()):
        inner = raw.get(draw(st.sampled_from(["rope_scaling", "quantization_config"])))
        if isinstance(inner, dict):
            inner[draw(INNER)] = draw(JSON)
    return raw


@given(configs() | JSON)
def test_any_config_is_refused_in_words_or_makes_the_layers_that_its_layout_has(raw: Any) -> None:
    try:
        config = layout.parse_config(raw, "config.json")
    except UserError as error:
        told = f"{error.fact}\n{error.hint}".encode()  # a terminal takes it
        assert told.count(b"\n") == 1 and len(told) < 2000
        return
    json.dumps(raw)
    if max(value for name, value in config.forward.items() if isinstance(value, int) and "position" not in name) > 4096:
        return  # what it would take, not what it is
    made = deepseek_v4.hf_config(config)
    deepseek_v4.Rotary(made, torch.device("cpu"), torch.bfloat16)
    for layer in config.layers:
        with unfilled():
            module = hf.DeepseekV4DecoderLayer(made, layer)
        ours = {
            deepseek_v4.renamed(name.removeprefix(f"layers.{layer}.")): tuple(shape)
            for name, shape in layout.layer_parameters(config, layer)
            if ".experts." not in name
        }
        theirs = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if ".experts." not in name}
        assert ours == theirs
