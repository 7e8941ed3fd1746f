"""From upstream tensors to the artifact's, for everything that is not quantized: passed through or decoded exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v4forge.checkpoint.codec import e8m0_to_f32
from v4forge.checkpoint.formats import Shape
from v4forge.checkpoint.layout import stored_name
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import ALIASES


def _fp8_through(checkpoint: Checkpoint, name: str, shape: Shape) -> dict[str, Tensor]:
    parts = checkpoint.parts(name, shape)
    checkpoint.decoded(name, parts)  # for its checks: NaN, scales outside BF16's range
    return {"weight": parts["weight"], "weight_scale": e8m0_to_f32(parts["scale"])}


def _fp4_through(checkpoint: Checkpoint, name: str, shape: Shape) -> dict[str, Tensor]:
    """The same bytes; that they decode, who computes with them has seen."""
    parts = checkpoint.parts(name, shape)
    return {"weight_packed": parts["weight"].view(torch.uint8), "weight_scale": parts["scale"].view(torch.uint8)}


def _decoded(dtype: torch.dtype) -> Callable[[Checkpoint, str, Shape], dict[str, Tensor]]:
    return lambda checkpoint, name, shape: {"": checkpoint.load(name, shape).to(dtype)}


def _unchanged(checkpoint: Checkpoint, name: str, shape: Shape) -> dict[str, Tensor]:
    return {"": checkpoint.load(name, shape)}


# (format upstream, format in the artifact) -> how to get from one to the other without loss
CONVERSIONS: dict[tuple[str, str], Callable[[Checkpoint, str, Shape], dict[str, Tensor]]] = {
    ("fp4", "mxfp4"): _fp4_through,
    ("fp8", "fp8-ct"): _fp8_through,
    ("fp8", "bf16"): _decoded(torch.bfloat16),
    ("fp4", "bf16"): _decoded(torch.bfloat16),
    ("bf16", "f32"): _decoded(torch.float32),
    ("bf16", "bf16"): _unchanged,
    ("f32", "f32"): _unchanged,
    ("int", "int"): _unchanged,
}


def converted(checkpoint: Checkpoint, name: str, shape: Shape) -> dict[str, Tensor]:
    """The artifact's stored tensors of an upstream logical tensor that is not quantized, aliases included."""
    rule = checkpoint.config.rule_for(name)
    parts = CONVERSIONS[rule.source, rule.artifact](checkpoint, name, shape)
    stored = {stored_name(name, part): tensor for part, tensor in parts.items()}
    return stored | {alias: stored[name] for alias, original in ALIASES.items() if original == name}
