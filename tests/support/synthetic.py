"""Random DeepSeek-V4 checkpoints in the exact upstream form, small enough for tests: `write_checkpoint`."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dev.tiny import train
from v4forge.checkpoint import codec, layout
from v4forge.checkpoint.formats import Shape
from v4forge.checkpoint.recipe import ALIASES, rule_for
from v4forge.checkpoint.writer import write_index, write_shard

Tensors = dict[str, Tensor]
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"

# Every kind of attention and of routing once; wq_a and wq_b (q_lora 160) have FP8 blocks cut at an edge.
SMALL: dict[str, Any] = {
    "compress_ratios": [0, 4, 128, 0],
    "head_dim": 64,
    "hidden_size": 128,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "index_topk": 16,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "o_groups": 2,
    "o_lora_rank": 32,
    "q_lora_rank": 160,
    "qk_rope_head_dim": 16,
    "vocab_size": 64,
}
# The other form, `write_checkpoint(directory, **OTHER)`: 12 experts top-3, other ratios, hardly a power of two.
OTHER: dict[str, Any] = {
    "compress_ratios": [0, 128, 4, 0, 4, 0],
    "head_dim": 128,
    "hidden_size": 384,
    "index_head_dim": 64,
    "index_n_heads": 6,
    "moe_intermediate_size": 128,
    "n_routed_experts": 12,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hash_layers": 2,
    "o_groups": 3,
    "o_lora_rank": 48,
    "q_lora_rank": 192,
    "qk_rope_head_dim": 32,
    "shards": 3,
    "vocab_size": 200,
}


def config_dict(**overrides: Any) -> dict[str, Any]:
    """A config.json with every upstream field: SMALL with `overrides`; compress_ratios gives the number of layers."""
    raw = deepcopy(train.CONFIG) | SMALL | overrides
    return raw | {"num_hidden_layers": overrides.get("num_hidden_layers", len(raw["compress_ratios"]) - 1)}


def random_tensor(name: str, shape: Shape, config: layout.Config, generator: torch.Generator) -> Tensor:
    """A logical tensor under which a forward pass stays of order one, and in which no two parameters are alike."""
    if name.endswith("tid2eid"):
        rows = [torch.randperm(config.n_routed_experts, generator=generator)[: shape[1]] for _ in range(shape[0])]
        return torch.stack(rows)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * noise
    if name.endswith("_scale"):
        return 0.6 + 0.1 * noise
    if name.endswith(("_base", "attn_sink", "ape")):
        return 0.5 * noise
    if name.endswith("gate.bias"):
        return 0.1 * noise
    if name == "embed.weight":
        return noise
    return noise / math.sqrt(shape[-1])


def encode_all_fp4(values: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """name -> encode_fp4(value), all matrices of a shape at once: groups lie within rows, so rows can be stacked."""
    encoded: dict[str, dict[str, Tensor]] = {}
    for shape in {v.shape for v in values.values()}:
        names = [n for n, v in values.items() if v.shape == shape]
        parts = codec.encode_fp4(torch.cat([values[n] for n in names]))
        pieces = {part: tensor.split(shape[0]) for part, tensor in parts.items()}
        encoded |= {n: {part: piece[i] for part, piece in pieces.items()} for i, n in enumerate(names)}
    return encoded


def artifact_shard(name: str) -> str:
    """Which shard of the artifact holds a stored tensor: "layers.N", "mtp", or "root", which the aliases belong to."""
    parts = name.split(".")
    if parts[0] == "layers":
        return f"layers.{parts[1]}"
    return "mtp" if parts[0] == "mtp" and name not in ALIASES else "root"


def heavy_tailed(name: str, shape: Shape, config: layout.Config, generator: torch.Generator) -> Tensor:
    """As `random_tensor`, but for routed experts: Student's t of 3 degrees, groups of 128 of lognormal sizes and, where
    a row has several, the first at 1/32; and router biases under which hardly a token reaches some experts.
    """
    usual = random_tensor(name, shape, config, generator)
    if name.endswith("gate.bias"):
        return 20 * usual
    if rule_for(name).kind != "routed experts":
        return usual
    chi = torch.randn((3, *shape), generator=generator).square().mean(0).sqrt()
    sizes = torch.randn(shape[0], shape[1] // 128, generator=generator).exp()
    if sizes.shape[1] > 1:
        sizes[:, 0] = sizes[:, 1:].amax(1) / 32
    return usual / chi * sizes.repeat_interleave(128, 1)


def write_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    shards: int = 2,
    draw: Callable[[str, Shape, layout.Config, torch.Generator], Tensor] = random_tensor,
    **overrides: Any,
) -> layout.Config:
    """Writes a random checkpoint: `shards` shards, index, config.json (see `config_dict`), generation_config.json, and
    models/tiny's tokenizer when vocab_size is its 1024. The scales of the last layer's attention lie in the shard after
    their weights', as happens upstream. draw: makes a logical tensor.
    """
    directory.mkdir(parents=True, exist_ok=True)
    raw = config_dict(**overrides)
    config = layout.parse_config(raw, "the synthetic config")
    generator = torch.Generator().manual_seed(seed)
    values = {n: draw(n, shape, config, generator) for n, shape in layout.parameters(config)}
    fp4 = encode_all_fp4({n: v for n, v in values.items() if rule_for(n).source == "fp4"})
    stored: dict[str, Tensor] = {}
    for name, value in values.items():
        fmt = rule_for(name).source
        if fmt in ("fp4", "fp8"):
            parts = fp4[name] if fmt == "fp4" else codec.encode_fp8(value)
            stored |= {layout.stored_name(name, part): tensor for part, tensor in parts.items()}
        else:
            stored[name] = value.to({"bf16": torch.bfloat16, "f32": torch.float32, "int": torch.int64}[fmt])
    shard_of = {name: number * shards // len(stored) for number, name in enumerate(stored)}
    last = f"layers.{config.num_hidden_layers - 1}.attn."
    for name in stored:
        if name.startswith(last) and name.endswith(".scale"):
            shard_of[name] = (shard_of[name.removesuffix("scale") + "weight"] + 1) % shards
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for number, file in enumerate(files):
        write_shard(directory / file, {n: t for n, t in stored.items() if shard_of[n] == number})
    total = sum(t.numel() * t.element_size() for t in stored.values())
    write_index(directory, {n: files[shard_of[n]] for n in stored}, total)
    (directory / "config.json").write_text(json.dumps(raw, indent=1))
    copied = ["generation_config.json"]
    if config.vocab_size == 1024:
        copied += ["tokenizer.json", "tokenizer_config.json"]
    for file in copied:
        shutil.copyfile(TINY / file, directory / file)
    return config


def edit(directory: Path, change: Callable[[Tensors], None]) -> None:
    """Applies `change` to the tensors of each shard, and makes the index agree with the result."""
    weight_map = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        change(tensors)
        write_shard(path, tensors)
        weight_map |= dict.fromkeys(tensors, path.name)
    write_index(directory, weight_map, 0)
