"""What the artifact must hold besides the routed experts, worked out a second time for verify.

Nothing here is shared with conversion.py and codec.py, which wrote the artifact: a fault there must not hide itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v4forge.checkpoint import Checkpoint
from v4forge.layout import Shape, stored_name
from v4forge.recipe import ALIASES, rule_for

Parts = dict[str, Tensor]


def powers_of_two(scale: Tensor) -> Tensor:
    """E8M0 bytes b -> 2^(b - 127), f32."""
    return torch.ldexp(torch.ones(scale.shape), scale.view(torch.uint8).int() - 127)


def e2m1(code: Tensor) -> Tensor:
    """Codes 0..15 -> f32: a sign, two bits of exponent with bias 1, one bit of mantissa, subnormals (OCP MX 1.0)."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, (code & 1).float()
    magnitude = torch.where(exponent > 0, torch.ldexp(1 + mantissa / 2, exponent.int() - 1), mantissa / 2)
    return torch.where(sign > 0, -magnitude, magnitude)


def _fp4(parts: Parts) -> Tensor:
    byte = parts["weight"].view(torch.uint8)
    values = torch.empty(byte.shape[0], 2 * byte.shape[1])
    values[:, 0::2], values[:, 1::2] = e2m1(byte & 15), e2m1(byte >> 4)  # the low nibble comes first
    column = torch.arange(values.shape[1]) // 32
    return values * powers_of_two(parts["scale"])[:, column]


def _fp8(parts: Parts) -> Tensor:
    weight = parts["weight"]
    row, column = (torch.arange(n) // 128 for n in weight.shape)
    return weight.float() * powers_of_two(parts["scale"])[row][:, column]


# (format upstream, format in the artifact) -> the artifact's parts
EXPECTED: dict[tuple[str, str], Callable[[Parts], Parts]] = {
    ("fp8", "fp8-ct"): lambda p: {"weight": p["weight"], "weight_scale": powers_of_two(p["scale"])},
    ("fp8", "bf16"): lambda p: {"": _fp8(p).bfloat16()},
    ("fp4", "bf16"): lambda p: {"": _fp4(p).bfloat16()},
    ("bf16", "f32"): lambda p: {"": p[""].float()},
    ("bf16", "bf16"): lambda p: p,
    ("f32", "f32"): lambda p: p,
    ("int", "int"): lambda p: p,
}


def expected(source: Checkpoint, name: str, shape: Shape) -> Parts:
    """The artifact's stored tensors of an upstream logical tensor that is not a routed expert, aliases included.

    Raises UserError when the source lacks a part or has it in another form.
    """
    rule = rule_for(name)
    parts = EXPECTED[rule.source, rule.artifact](source.parts(name, shape))
    stored = {stored_name(name, part): tensor for part, tensor in parts.items()}
    return stored | {alias: stored[name] for alias, original in ALIASES.items() if original == name}
