"""Every tensor of a DeepSeek-V4 checkpoint, derived from its config: what must be there, never what happens to be.

`upstream(config)` and `artifact(config)` map stored tensor names to (dtype, shape): 69,187 and 101,285 for
DeepSeek-V4-Flash. Shapes are torch's: a Linear is [out, in].
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from v4forge.checkpoint.formats import FP4_GROUP, INT4_GROUP, PARTS, Shape, TensorSpec
from v4forge.checkpoint.recipe import ALIASES, rule_for
from v4forge.errors import UserError

COMPRESS_RATIOS = {0: "sliding window", 4: "CSA", 128: "HCA"}


@dataclass(frozen=True)
class Config:
    """What the layout depends on, from config.json; `raw` is the whole file."""

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

    @property
    def layers(self) -> range:
        return range(self.num_hidden_layers)


def load_config(directory: Path) -> Config:
    """Reads and checks `directory`/config.json; UserError for anything that is not DeepSeek-V4 with one MTP block."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} does not exist", "point --source at a DeepSeek-V4 checkpoint folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "make it a readable file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", "download the file again") from None
    return parse_config(raw, str(path))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_config(raw: Any, where: str) -> Config:
    """The checked Config of a config.json's content; `where` names it in errors."""
    pinned = "use the first release of DeepSeek-V4-Flash (FLASH_REVISION in versions.env)"

    def refuse(fact: str, hint: str = pinned) -> NoReturn:
        raise UserError(f"{where}: {fact}", hint)

    if not isinstance(raw, dict):
        refuse("not an object of settings", "download the file again")
    if raw.get("model_type") != "deepseek_v4" or raw.get("architectures") != ["DeepseekV4ForCausalLM"]:
        refuse(f"model_type {raw.get('model_type')!r}, architectures {raw.get('architectures')!r} is not DeepSeek-V4")
    names = [n for n in Config.__dataclass_fields__ if n != "raw"]
    missing = [n for n in names if n not in raw]
    if missing:
        refuse(f"no {missing[0]!r}: this is not DeepSeek-V4's upstream config")
    ratios = raw["compress_ratios"]
    if not isinstance(ratios, list) or not all(_is_count(r) for r in ratios):
        refuse(f"compress_ratios is {ratios!r}, it must be a list with one of {sorted(COMPRESS_RATIOS)} a layer")
    counts = {n: raw[n] for n in names if n != "compress_ratios"}
    for name, value in counts.items():
        if not _is_count(value) or (value == 0 and name != "num_hash_layers"):
            refuse(f"{name} is {value!r}, it must be a positive integer")
    config = Config(raw=raw, compress_ratios=tuple(ratios), **counts)
    if raw.get("num_nextn_predict_layers") != 1:
        refuse(f"num_nextn_predict_layers is {raw.get('num_nextn_predict_layers')!r}, only 1 MTP block is supported")
    if len(config.compress_ratios) != config.num_hidden_layers + 1:
        refuse(
            f"compress_ratios has {len(config.compress_ratios)} entries for {config.num_hidden_layers} layers"
            " + 1 MTP block (the -0731 release has more)"
        )
    if bad := [r for r in config.compress_ratios if r not in COMPRESS_RATIOS]:
        refuse(f"compress_ratios holds {bad[0]}, known are {sorted(COMPRESS_RATIOS)}")
    if config.compress_ratios[-1] != 0:
        refuse(f"the MTP block's compress ratio is {config.compress_ratios[-1]}, it must be 0, sliding attention (N1)")
    for name, divisor in (
        ("hidden_size", INT4_GROUP),
        ("moe_intermediate_size", INT4_GROUP),
        ("hidden_size", FP4_GROUP),
        ("head_dim", 2),
    ):
        if getattr(config, name) % divisor:
            refuse(f"{name} {getattr(config, name)} is not divisible by {divisor}", "W4A16 g128 needs whole groups")
    if (config.num_attention_heads * config.head_dim) % config.o_groups:
        refuse(f"o_groups {config.o_groups} does not divide {config.num_attention_heads} heads of {config.head_dim}")
    for part, whole in (("num_hash_layers", "num_hidden_layers"), ("num_experts_per_tok", "n_routed_experts")):
        if (some := getattr(config, part)) > (everything := getattr(config, whole)):
            refuse(f"{part} is {some}, more than {whole}, {everything}")
    return config


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
    specs = {k: v for name, shape in parameters(c) for k, v in stored(name, shape, rule_for(name).artifact).items()}
    return specs | {alias: specs[original] for alias, original in ALIASES.items()}
