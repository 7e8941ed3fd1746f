"""Matrices to quantize, and their loss in float64: for the tests of gptq and of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4forge.quantization import gptq

CPU = torch.device("cpu")
DAMPENING = 0.01
EXPERTS, OUT, IN, TOKENS = 3, 48, 256, 700


@dataclass
class Problem:
    """weights: [E, out, in] bf16; x: [E, tokens, in] bf16; hessians: [E, in, in] f32, means of x^T x."""

    weights: Tensor
    x: Tensor
    hessians: Tensor


def problem(seed: int = 0) -> Problem:
    """Correlated inputs of very different sizes, as activations are; weights with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(EXPERTS, IN, IN, generator=generator) / IN**0.5 + torch.eye(IN)
    sizes = torch.rand(EXPERTS, 1, IN, generator=generator) ** 2 + 0.05
    x = ((torch.randn(EXPERTS, TOKENS, IN, generator=generator) * sizes) @ mixing).bfloat16()
    weights = torch.randn(EXPERTS, OUT, IN, generator=generator) / IN**0.5
    weights *= torch.where(torch.rand(weights.shape, generator=generator) < 0.01, 4.0, 1.0)
    return Problem(weights.bfloat16(), x, torch.stack([gptq.gram(each) / TOKENS for each in x]))


def weighted_error(weights: Tensor, served: Tensor, hessians: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T), [E] f64; 0 where the denominator is 0."""
    w, left, h = weights.double(), weights.double() - served.double(), hessians.double()
    lost, whole = (((m @ h) * m).sum((1, 2)) for m in (left, w))
    return torch.where(whole > 0, lost / whole, 0.0)


def indefinite(width: int) -> Tensor:
    """A symmetric matrix with a positive diagonal and a negative eigenvalue, far beyond what dampening mends."""
    return torch.eye(width) * -1 + 2


class OnGpu(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True
