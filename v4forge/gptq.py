"""INT4 g128 of a batch of expert matrices: Hessians, GPTQ on llm-compressor's kernels, round-to-nearest, errors.

GPTQ: Frantar et al. 2022 (arXiv 2210.17323). E is the number of experts; matrices are [out, in] as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from v4forge.codec import INT4_GROUP, dequantize_int4

QUANT_ARGS = QuantizationArgs(
    num_bits=4, type="int", strategy="group", group_size=INT4_GROUP, symmetric=True, actorder="static"
)
BLOCK_COLUMNS = 128
# Candidate scales in units of absmax / 7.5, tried for every group of 128 weights.
SCALE_GRID = (1.0, *(1.1 - i / 30 for i in range(13) if i != 3))  # absmax wins ties, then 1.1 down to 0.7
SCALE_CHUNK = 8  # experts searched at a time, which bounds the temporary memory


@dataclass(frozen=True)
class Quantized:
    """codes: [E, out, in] i8, -8..7; scale: [E, out, in/128] bf16, static: one per group of neighbouring inputs.

    `fallback` lists the experts whose Hessian could not be factorized, so that they were rounded to nearest.
    """

    codes: Tensor
    scale: Tensor
    fallback: tuple[int, ...] = ()

    def dequantized(self) -> Tensor:
        """The weights as served, [E, out, in] bf16."""
        return dequantize_int4(self.codes, self.scale)


def concatenated(parts: Sequence[Quantized]) -> Quantized:
    """The experts of all parts, in order."""
    starts = accumulate((len(part.codes) for part in parts), initial=0)
    return Quantized(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        tuple(start + e for start, part in zip(starts, parts, strict=False) for e in part.fallback),
    )


def gram(x: Tensor) -> Tensor:
    """x^T x with F32 accumulation. x: [tokens, in] -> [in, in] f32. Products of BF16 values are exact in F32."""
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        return torch.mm(x.mT, x, out_dtype=torch.float32)
    x = x.float()
    return x.mT @ x


def absmax_scales(weights: Tensor) -> Tensor:
    """weights: [E, out, in] -> [E, out, in/128] bf16: absmax / 7.5, compressed-tensors' symmetric INT4 rule."""
    groups = weights.float().unflatten(-1, (-1, INT4_GROUP))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), QUANT_ARGS)
    return scale.to(torch.bfloat16)


def searched_scales(weights: Tensor, hessians: Tensor) -> Tensor:
    """weights: [E, out, in]; hessians: [E, in, in] -> [E, out, in/128] bf16.

    Per group the candidate of SCALE_GRID whose rounding error is smallest, weighted by how active each input is (the
    Hessian's diagonal). FP4 source weights lie on few values, which absmax / 7.5 misses as a rule.
    """
    chosen = []
    importance = hessians.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, INT4_GROUP)).unsqueeze(1)
    for some, weight_of in zip(weights.split(SCALE_CHUNK), importance.split(SCALE_CHUNK), strict=True):
        groups = some.float().unflatten(-1, (-1, INT4_GROUP))
        widest = absmax_scales(some).float()
        best = widest
        least = torch.full_like(widest, torch.inf)
        for factor in SCALE_GRID:
            scale = (widest * factor).to(torch.bfloat16).float()
            step = scale.unsqueeze(-1)
            error = (((groups / step).round().clamp(-8, 7) * step - groups).square() * weight_of).sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        chosen.append(best.to(torch.bfloat16))
    return torch.cat(chosen)


def round_to_nearest(weights: Tensor, scale: Tensor) -> Quantized:
    """weights: [E, out, in]; scale: [E, out, in/128] bf16 -> each weight at its nearest code."""
    groups = weights.float().unflatten(-1, (-1, INT4_GROUP))
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int8).flatten(-2)
    return Quantized(codes, scale)


@lru_cache
def _kernel() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """llm-compressor's batched GPTQ, imported when first needed: that takes seconds."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    return quantize_weight


def gptq(weights: Tensor, hessians: Tensor, scale: Tensor, dampening: float) -> Quantized:
    """weights: [E, out, in]; hessians: [E, in, in] f32, means of x^T x; scale: [E, out, in/128] bf16 -> Quantized.

    Columns are taken in the order of falling activation (`actorder: static`). An input that was never active has a zero
    diagonal, for which the kernel would write zeros: it gets a small positive one instead and is rounded to nearest.
    The dampening is a share of the diagonal's mean.
    """
    quantize_weight = _kernel()
    working = hessians.clone()
    diagonal = working.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, torch.where(mean > 0, mean * 1e-6, 1.0)))
    wide = scale.float()
    try:
        values, _, fallback = quantize_weight(
            weights.float(), working, wide, torch.zeros_like(wide), None, QUANT_ARGS, BLOCK_COLUMNS, dampening
        )
    except torch.linalg.LinAlgError:  # the kernel catches a failure of its first factorization only
        if len(weights) == 1:
            return Quantized(round_to_nearest(weights, scale).codes, scale, (0,))
        each = zip(weights.split(1), hessians.split(1), scale.split(1), strict=True)
        return concatenated([gptq(w, h, s, dampening) for w, h, s in each])
    groups = values.unflatten(-1, (-1, INT4_GROUP))
    codes = (groups / wide.unsqueeze(-1)).round().to(torch.int8).flatten(-2)
    return Quantized(codes, scale, tuple(torch.nonzero(fallback).flatten().tolist()))


def weighted_error(weights: Tensor, quantized: Tensor, hessians: Tensor) -> Tensor:
    """tr(D H D^T) / tr(W H W^T), D = W - Q, per expert, [E] f64: the share of the output's energy that is lost."""
    w, h = weights.double(), hessians.double()
    d = w - quantized.double()
    lost, total = (torch.einsum("eri,eij,erj->e", m, h, m) for m in (d, w))
    return torch.where(total > 0, lost / total, 0.0)


def blended(own: Tensor, count: int, everything: Tensor) -> Tensor:
    """The Hessian of an expert that only `count` tokens reach, from means of x^T x. own, everything: [in, in] f32.

    Below its width n tokens cannot determine it; the missing m = in - n are taken from all tokens:
    H = (n H_own + m H_everything) / (n + m).
    """
    missing = max(0, own.shape[0] - count)
    return (count * own + missing * everything) / (count + missing)
