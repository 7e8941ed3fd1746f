"""Every tensor of a DeepSeek-V4 checkpoint, derived from its config: what must be there, never what happens to be.

`upstream(config)` and `artifact(config)` map stored tensor names to (dtype, shape): 69,187 and 101,285 for
DeepSeek-V4-Flash. Shapes are torch's: a Linear is [out, in].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from v4forge.checkpoint import config_schema, recipe
from v4forge.checkpoint.config_schema import COMPRESS_RATIOS, PINNED, shown
from v4forge.checkpoint.formats import FP4_GROUP, INT4_GROUP, PARTS, Shape, TensorSpec
from v4forge.checkpoint.recipe import ALIASES, Rule, rule_for
from v4forge.errors import UserError
from v4forge.files import check_no_pointer


@dataclass(frozen=True)
class Config:
    """What the layout depends on, from config.json; `raw` is the whole file.

    recipe: a key of RECIPES; of an artifact the one that it states, of a source the one by which its artifact is made.
    """

    raw: dict[str, Any]
    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    index_n_heads: int
    index_head_dim: int
    hc_mult: int
    compress_ratios: tuple[int, ...]
    recipe: str = recipe.INT4

    @property
    def fp4_layers(self) -> int:
        """Of how many layers, the hash-routed ones, which come first, the routed experts stay FP4 in the artifact."""
        return self.num_hash_layers if self.recipe == recipe.MIXED else 0

    def rule_for(self, name: str) -> Rule:
        """The recipe's rule of a logical tensor name; KeyError for a name that no rule knows."""
        return rule_for(name, self.fp4_layers)

    @property
    def layers(self) -> range:
        return range(self.num_hidden_layers)

    @property
    def forward(self) -> dict[str, Any]:
        """What the layers are made from: the settings that were checked, and no others."""
        return config_schema.forward(self.raw)


def load_config(directory: Path, form: str = "source") -> Config:
    """Reads and checks `directory`/config.json, of a "source" or an "artifact"; UserError for anything that is not
    DeepSeek-V4 with one MTP block."""
    path = directory / "config.json"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist", "point --source at a DeepSeek-V4 checkpoint folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "make it a readable file") from None
    check_no_pointer(path)
    return read_config(content, str(path), form)


def read_config(content: bytes, where: str, form: str = "source") -> Config:
    """The checked Config of a config.json's bytes; `where` names it in errors. Raises UserError."""
    try:
        raw = json.loads(content, object_pairs_hook=_each_once)
        json.dumps(raw, indent=1)  # as postprocess writes it: a part nobody reads may be nested too deeply for that
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}", "download the file again") from None
    return parse_config(raw, where, form)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a name that comes twice, readers differ in which value they take."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def parse_config(raw: Any, where: str, form: str = "source") -> Config:
    """The checked Config of a config.json's content; `where` names it in errors. Raises UserError.

    form: "source", "artifact", or "saved" by another tool, of which only the sizes are checked.
    """

    def refuse(fact: str, hint: str = PINNED) -> NoReturn:
        raise UserError(f"{where}: {fact}", hint)

    if not isinstance(raw, dict):
        refuse("not an object of settings", "download the file again")
    if raw.get("model_type") != "deepseek_v4" or raw.get("architectures") != ["DeepseekV4ForCausalLM"]:
        kind = f"model_type {shown(raw.get('model_type'))}, architectures {shown(raw.get('architectures'))}"
        refuse(f"{kind} is not DeepSeek-V4")
    if faults := config_schema.faults(raw, form):
        refuse(*faults)
    counts = {n: raw[n] for n in Config.__dataclass_fields__ if n not in ("raw", "compress_ratios", "recipe")}
    made_by = recipe.stated(raw.get("quantization_config")) if form == "artifact" else recipe.INT4
    config = Config(raw=raw, compress_ratios=tuple(raw["compress_ratios"]), recipe=made_by, **counts)
    disagreements = chain(_in_shape(config), () if form == "saved" else _in_forward(config))
    if fault := next(disagreements, None):
        refuse(*fault)
    return config


def _in_shape(c: Config) -> Iterator[tuple[str, str]]:
    """Sizes that are fine by themselves and not beside each other: a fact and a hint each."""
    if len(c.compress_ratios) != c.num_hidden_layers + 1:
        count = f"compress_ratios has {len(c.compress_ratios)} entries for {c.num_hidden_layers} layers + 1 MTP block"
        yield f"{count} (the -0731 release has more)", PINNED
    if bad := [r for r in c.compress_ratios if r not in COMPRESS_RATIOS]:
        yield f"compress_ratios holds {shown(bad[0])}, known are {sorted(COMPRESS_RATIOS)}", PINNED
    if (last := c.compress_ratios[-1]) != 0:
        yield f"the MTP block's compress ratio is {last}, it must be 0, sliding attention (N1)", PINNED
    for name, divisor in (
        ("hidden_size", INT4_GROUP),
        ("moe_intermediate_size", INT4_GROUP),
        ("hidden_size", FP4_GROUP),
        ("head_dim", 2),
    ):
        if getattr(c, name) % divisor:
            yield f"{name} {getattr(c, name)} is not divisible by {divisor}", "W4A16 g128 needs whole groups"
    if (c.num_attention_heads * c.head_dim) % c.o_groups:
        yield f"o_groups {c.o_groups} does not divide {c.num_attention_heads} heads of {c.head_dim}", PINNED
    for part, whole in (("num_hash_layers", "num_hidden_layers"), ("num_experts_per_tok", "n_routed_experts")):
        if (some := getattr(c, part)) > (everything := getattr(c, whole)):
            yield f"{part} is {some}, more than {whole}, {everything}", PINNED


def _in_forward(c: Config) -> Iterator[tuple[str, str]]:
    """The same of what the forward pass reads besides, and of token ids."""
    values = c.forward
    rope, yarn = values["qk_rope_head_dim"], values["rope_scaling"]
    if rope % 2:
        yield f"qk_rope_head_dim {rope} is not divisible by 2", "rotary embedding turns pairs"
    for whole in ("head_dim", "index_head_dim"):
        if rope > values[whole]:
            yield f"qk_rope_head_dim is {rope}, more than {whole}, {values[whole]}", PINNED
    if int(c.head_dim * (rope / c.head_dim)) != rope:  # as transformers computes it
        yield f"qk_rope_head_dim {rope} is no share of head_dim {c.head_dim} in floating point", PINNED
    if (fast := yarn["beta_fast"]) <= (slow := yarn["beta_slow"]):
        yield f"rope_scaling.beta_fast is {fast:g}, not more than beta_slow, {slow:g}", PINNED
    for name in ("bos_token_id", "eos_token_id"):
        ids = c.raw.get(name)
        for token in ids if isinstance(ids, list) else [ids]:
            if token is not None and token >= c.vocab_size:
                yield f"{name} is {shown(token)}, the vocabulary ends at {c.vocab_size - 1}", PINNED


def _compressor(prefix: str, ratio: int, head_dim: int, hidden: int) -> Iterator[tuple[str, Shape]]:
    width = head_dim * (2 if ratio == 4 else 1)  # CSA keeps two overlapping series in one tensor
    yield f"{prefix}.ape", (ratio, width)
    yield f"{prefix}.norm.weight", (head_dim,)
    yield f"{prefix}.wgate.weight", (width, hidden)
    yield f"{prefix}.wkv.weight", (width, hidden)


def _hyper_head(prefix: str, c: Config) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}hc_head_base", (c.hc_mult,)
    yield f"{prefix}hc_head_fn", (c.hc_mult, c.hc_mult * c.hidden_size)
    yield f"{prefix}hc_head_scale", (1,)


def _mlp(prefix: str, c: Config) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.w1.weight", (c.moe_intermediate_size, c.hidden_size)
    yield f"{prefix}.w2.weight", (c.hidden_size, c.moe_intermediate_size)
    yield f"{prefix}.w3.weight", (c.moe_intermediate_size, c.hidden_size)


def _block(prefix: str, c: Config, ratio: int, hashed: bool) -> Iterator[tuple[str, Shape]]:
    attn, ffn, hc = f"{prefix}.attn", f"{prefix}.ffn", c.hc_mult
    mix = (2 + hc) * hc
    yield f"{prefix}.attn_norm.weight", (c.hidden_size,)
    yield f"{prefix}.ffn_norm.weight", (c.hidden_size,)
    for site in ("attn", "ffn"):
        yield f"{prefix}.hc_{site}_base", (mix,)
        yield f"{prefix}.hc_{site}_fn", (mix, hc * c.hidden_size)
        yield f"{prefix}.hc_{site}_scale", (3,)
    heads_dim = c.num_attention_heads * c.head_dim
    yield f"{attn}.attn_sink", (c.num_attention_heads,)
    yield f"{attn}.q_norm.weight", (c.q_lora_rank,)
    yield f"{attn}.kv_norm.weight", (c.head_dim,)
    yield f"{attn}.wq_a.weight", (c.q_lora_rank, c.hidden_size)
    yield f"{attn}.wq_b.weight", (heads_dim, c.q_lora_rank)
    yield f"{attn}.wkv.weight", (c.head_dim, c.hidden_size)
    yield f"{attn}.wo_a.weight", (c.o_groups * c.o_lora_rank, heads_dim // c.o_groups)
    yield f"{attn}.wo_b.weight", (c.hidden_size, c.o_groups * c.o_lora_rank)
    if ratio:
        yield from _compressor(f"{attn}.compressor", ratio, c.head_dim, c.hidden_size)
    if ratio == 4:
        yield from _compressor(f"{attn}.indexer.compressor", 4, c.index_head_dim, c.hidden_size)
        yield f"{attn}.indexer.weights_proj.weight", (c.index_n_heads, c.hidden_size)
        yield f"{attn}.indexer.wq_b.weight", (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
    yield f"{ffn}.gate.weight", (c.n_routed_experts, c.hidden_size)
    if hashed:
        yield f"{ffn}.gate.tid2eid", (c.vocab_size, c.num_experts_per_tok)
    else:
        yield f"{ffn}.gate.bias", (c.n_routed_experts,)
    for expert in range(c.n_routed_experts):
        yield from _mlp(f"{ffn}.experts.{expert}", c)
    yield from _mlp(f"{ffn}.shared_experts", c)


def layer_parameters(c: Config, layer: int) -> Iterator[tuple[str, Shape]]:
    """Logical tensors of decoder layer `layer`."""
    return _block(f"layers.{layer}", c, c.compress_ratios[layer], layer < c.num_hash_layers)


def root_parameters(c: Config) -> Iterator[tuple[str, Shape]]:
    """Logical tensors outside the decoder layers and the MTP block."""
    yield "embed.weight", (c.vocab_size, c.hidden_size)
    yield "head.weight", (c.vocab_size, c.hidden_size)
    yield "norm.weight", (c.hidden_size,)
    yield from _hyper_head("", c)


def mtp_parameters(c: Config) -> Iterator[tuple[str, Shape]]:
    """Logical tensors of the MTP block: a sliding-attention layer with its own input and output parts."""
    yield from _block("mtp.0", c, 0, hashed=False)
    for norm in ("enorm", "hnorm", "norm"):
        yield f"mtp.0.{norm}.weight", (c.hidden_size,)
    for projection in ("e_proj", "h_proj"):
        yield f"mtp.0.{projection}.weight", (c.hidden_size, c.hidden_size)
    yield from _hyper_head("mtp.0.", c)


def parameters(c: Config) -> Iterator[tuple[str, Shape]]:
    """All logical tensors with their shapes."""
    yield from root_parameters(c)
    for layer in c.layers:
        yield from layer_parameters(c, layer)
    yield from mtp_parameters(c)


def stored_name(logical: str, part: str) -> str:
    """The stored name of `part` of a logical tensor: layers.0.attn.wq_a.weight, scale -> layers.0.attn.wq_a.scale."""
    return logical.rsplit(".", 1)[0] + "." + part if part else logical


def stored(logical: str, shape: Shape, fmt: str) -> dict[str, TensorSpec]:
    """The stored tensors of a logical one in a format of formats.PARTS."""
    return {stored_name(logical, part): spec for part, spec in PARTS[fmt](shape).items()}


def upstream(c: Config) -> dict[str, TensorSpec]:
    """Every tensor of the upstream checkpoint."""
    return {k: v for name, shape in parameters(c) for k, v in stored(name, shape, rule_for(name).source).items()}


def artifact(c: Config) -> dict[str, TensorSpec]:
    """Every tensor of the artifact, aliases included."""
    specs = {k: v for name, shape in parameters(c) for k, v in stored(name, shape, c.rule_for(name).artifact).items()}
    return specs | {alias: specs[original] for alias, original in ALIASES.items()}
