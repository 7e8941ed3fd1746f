"""INT4 g128 of a batch of expert matrices: Hessians, scales, GPTQ and round-to-nearest.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) in its LDL form (Chee et al. 2023, arXiv 2307.13304, theorem 6): with the
inputs in the order of rising activation and the dampened Hessian H = L L^T, column k becomes

    code_k = round((w_k + sum_{j > k} (w_j - q_j) L_jk / L_kk) / scale_k),

from the last, most active one to the first. That is GPTQ's own update, but no inverse is needed, one factorization
serves all matrices that read the same input, and the blocks before are added by one product with a long inner
dimension.

A group's scale may be negative: its codes then reach from -7 to 8 of its steps, which is where the larger half of its
weights may need them. Decoders multiply, and do not ask for the sign.

E is the number of experts; matrices are [out, in] as in torch. On a GPU the two inner loops are kernels.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from v4forge.checkpoint.codec import dequantize_int4
from v4forge.checkpoint.formats import INT4_GROUP
from v4forge.lean_imports import lean

with lean("compressed_tensors.quantization"):  # which imports transformers
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

QUANT_ARGS = QuantizationArgs(
    num_bits=4, type="int", strategy="group", group_size=INT4_GROUP, symmetric=True, actorder="static"
)
SWEEP_COLUMNS = 128  # a block of the sweep
# Tokens of one product: tensor cores cut their F32 sums toward zero, by 5e-4 of the value after 100,000 terms.
GRAM_ROWS = 8192
FACTOR_COLUMNS = 128  # a block of the batched Cholesky factorization
# Where the search of a group's scale starts, in units of absmax / 7.5, with either sign. From 8 or 64 between the same
# ends the output error on models/tiny is the same to 0.4% (benchmarks/results/codes-tiny-h200.json).
SCALE_GRID = (1.0, *(0.5 + 0.8 * i / 11 for i in range(12)))
REFIT_AT_MOST = 1.25  # by so much a scale may grow or shrink in the refit, for the same reason


@dataclass(frozen=True)
class Quantized:
    """codes: [E, out, in] i8, -8..7; scale: [E, out, in/128] bf16, static: one per group of neighbouring inputs."""

    codes: Tensor
    scale: Tensor

    def dequantized(self) -> Tensor:
        """The weights as served, [E, out, in] bf16."""
        return dequantize_int4(self.codes, self.scale)


@dataclass(frozen=True)
class Factor:
    """The dampened Hessians H = U D U^T with unit triangular U, inputs in the order of rising activation."""

    order: Tensor  # [E, in] i64, the input at each position
    lower: Tensor  # [E, in, in] f32, unit lower triangular
    pivots: Tensor  # [E, in] f32, D
    failed: Tensor  # [E] bool, not positive definite: the factor is of the diagonal alone


@contextmanager
def tf32() -> Iterator[None]:
    """F32 products on tensor cores with 11-bit factors. For sums of many rounding errors, whose own size is a step."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gram(x: Tensor) -> Tensor:
    """x^T x with F32 accumulation. x: [tokens, in] -> [in, in] f32. Products of BF16 values are exact in F32."""
    if x.is_cuda and x.dtype == torch.bfloat16 and len(x):
        total = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        for part in x.split(GRAM_ROWS):
            total += torch.mm(part.mT, part, out_dtype=torch.float32)
        return total
    x = x.float()
    return x.mT @ x


def blended(own: Tensor, count: int, everything: Tensor) -> Tensor:
    """The Hessian of an expert that `count` tokens reach, from means of x^T x. own, everything: [in, in] f32.

    n tokens determine `in` inputs badly where n is not many times `in`, and below it not at all: as many of all tokens
    as there are inputs are counted with them, H = (n H_own + in H_everything) / (n + in). Where n is large, that is
    little (benchmarks/codes.py: 33% less output error at n = in / 2, 7% at 3 in, 1% at 15 in).
    """
    width = own.shape[0]
    return (count * own + width * everything) / (count + width)


def absmax_scales(weights: Tensor) -> Tensor:
    """weights: [E, out, in] -> [E, out, in/128] bf16: absmax / 7.5, compressed-tensors' symmetric INT4 rule."""
    low, high = torch.aminmax(weights.unflatten(-1, (-1, INT4_GROUP)), dim=-1)
    scale, _ = calculate_qparams(low.float(), high.float(), QUANT_ARGS)
    return scale.to(torch.bfloat16)


def searched_scales(weights: Tensor, importance: Tensor) -> Tensor:
    """weights: [E, out, in]; importance: [E, in] f32, the Hessians' diagonals -> [E, out, in/128] bf16.

    Per group the scale whose rounding error is smallest, weighted by how active each input is, h: every candidate of
    SCALE_GRID, of either sign, gives codes c, for which sum(h w c) / sum(h c^2) is the best scale; between the grid's
    ends, or a group whose active inputs have small weights would have the large ones cut to half. FP4 source weights
    lie on few values, which absmax / 7.5 misses as a rule.
    """
    widest = absmax_scales(weights)
    if weights.is_cuda:
        from v4forge.quantization import kernels

        return kernels.searched_scales(weights, importance, widest, SCALE_GRID)
    by_input = importance.unflatten(-1, (-1, INT4_GROUP)).unsqueeze(1)
    groups = weights.float().unflatten(-1, (-1, INT4_GROUP))
    weighted = groups * by_input
    best = widest.float()
    most = torch.zeros_like(best)  # of the energy that a scale explains: what it leaves is the error
    for factor in SCALE_GRID:
        steps = groups / (widest.float() * factor).unsqueeze(-1)
        for codes in (steps.round().clamp_(-8, 7), steps.neg_().round_().clamp_(-8, 7)):
            along, size = (weighted * codes).sum(-1), (codes.square() * by_input).sum(-1)
            fitted = along / size
            scale = fitted.sign() * fitted.abs().clamp(
                widest.float() * min(SCALE_GRID), widest.float() * max(SCALE_GRID)
            )
            explained = scale * (2 * along - scale * size)
            better = explained > most  # not for NaN, of a group without active inputs
            best = torch.where(better, scale, best)
            most = torch.where(better, explained, most)
    return best.to(torch.bfloat16)


def round_to_nearest(weights: Tensor, scale: Tensor) -> Quantized:
    """weights: [E, out, in]; scale: [E, out, in/128] bf16 -> each weight at its nearest code."""
    groups = weights.float().unflatten(-1, (-1, INT4_GROUP))
    codes = (groups / scale.float().unsqueeze(-1)).round_().clamp_(-8, 7).to(torch.int8).flatten(-2)
    return Quantized(codes, scale)


def factorize(hessians: Tensor, dampening: float) -> Factor:
    """hessians: [E, in, in] f32, means of x^T x; dampening: what is added to the diagonal, as a share of its mean.

    An input that was never active has a zero diagonal; it gets a small positive one and is rounded to nearest.
    """
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal = torch.where(diagonal > 0, diagonal, torch.where(mean > 0, mean * 1e-6, 1.0))
    order = torch.argsort(diagonal, dim=-1, stable=True)
    damp = dampening * diagonal.mean(-1)
    batch = torch.arange(len(hessians), device=hessians.device).view(-1, 1, 1)
    ordered = hessians[batch, order.unsqueeze(-1), order.unsqueeze(-2)]
    damped = diagonal.gather(-1, order) + damp.unsqueeze(-1)
    ordered.diagonal(dim1=-2, dim2=-1).copy_(damped)
    lower, failed = _cholesky(ordered)
    if bool(failed.any()):
        lower[failed] = torch.diag_embed(damped[failed].sqrt())
    roots = lower.diagonal(dim1=-2, dim2=-1).clone()
    return Factor(order, lower.div_(roots.unsqueeze(-2)), roots.square(), failed)


def _cholesky(a: Tensor) -> tuple[Tensor, Tensor]:
    """a: [E, n, n] f32 symmetric, overwritten -> lower triangular factors, and [E] whether one does not exist.

    On a GPU in blocks of columns, which are nearly all batched products: twice the speed of the library's.
    """
    if not a.is_cuda:
        lower, info = torch.linalg.cholesky_ex(a)
        return lower.contiguous(), info > 0
    n = a.shape[-1]
    failed = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    identity = torch.eye(FACTOR_COLUMNS, device=a.device).expand(len(a), -1, -1)
    for start in range(0, n, FACTOR_COLUMNS):
        end = min(start + FACTOR_COLUMNS, n)
        if start:
            a[:, start:, start:end].baddbmm_(a[:, start:, :start], a[:, start:end, :start].mT, alpha=-1)
        block, info = torch.linalg.cholesky_ex(a[:, start:end, start:end])
        failed |= info > 0
        a[:, start:end, start:end] = block
        a[:, start:end, end:] = 0
        if end < n:
            inverse = torch.linalg.solve_triangular(block, identity[:, : end - start, : end - start], upper=False)
            a[:, end:, start:end] = torch.bmm(a[:, end:, start:end], inverse.mT)
    return a, failed | ~a.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)


def sweep(weights: Tensor, factor: Factor, scale: Tensor) -> Quantized:
    """weights: [E, out, in] bf16 or f32; scale: [E, out, in/128] bf16; factor: of E Hessians, or of one for all."""
    experts, rows, width = weights.shape
    order = factor.order.expand(experts, -1)
    lower = factor.lower.expand(experts, -1, -1)
    ordered = weights.gather(-1, order.unsqueeze(1).expand(-1, rows, -1))
    residual = torch.empty(weights.shape, dtype=torch.float32, device=weights.device)  # W - Q
    codes = torch.empty(weights.shape, dtype=torch.int8, device=weights.device)
    group_of = order // INT4_GROUP
    if weights.is_cuda:
        from v4forge.quantization import kernels

        block_of = kernels.sweep_block
    else:
        block_of = _sweep_block
    for start in reversed(range(0, width, SWEEP_COLUMNS)):
        end = min(start + SWEEP_COLUMNS, width)
        carried = None  # what the columns after this block leave to it
        if end < width:
            with tf32():
                carried = torch.bmm(residual[..., end:], lower[:, end:, start:end])
        block_of(start, end, carried, ordered, lower, scale, group_of, residual, codes)
    inverse = torch.empty_like(order).scatter_(-1, order, torch.arange(width, device=order.device).expand(experts, -1))
    return Quantized(codes.gather(-1, inverse.unsqueeze(1).expand(-1, rows, -1)), scale)


def _sweep_block(
    start: int,
    end: int,
    carried: Tensor | None,
    ordered: Tensor,
    lower: Tensor,
    scale: Tensor,
    group_of: Tensor,
    residual: Tensor,
    codes: Tensor,
) -> None:
    """Columns end-1 down to start of all rows; fills `residual` and `codes` there."""
    original = ordered[..., start:end].float()
    target = original.clone() if carried is None else original + carried
    steps = scale.float().gather(-1, group_of[:, None, start:end].expand(-1, ordered.shape[1], -1))
    for k in reversed(range(end - start)):
        code = (target[..., k] / steps[..., k]).round().clamp(-8, 7)
        value = code * steps[..., k]
        codes[..., start + k] = code.to(torch.int8)
        residual[..., start + k] = left = original[..., k] - value
        target[..., :k] += left.unsqueeze(-1) * lower[:, None, start + k, start : start + k]


def gptq(weights: Tensor, hessians: Tensor, scale: Tensor, dampening: float) -> Quantized:
    """weights: [E, out, in]; hessians: [E, in, in] f32, means of x^T x; scale: [E, out, in/128] bf16 -> Quantized."""
    return sweep(weights, factorize(hessians, dampening), scale)


def damp_of(hessians: Tensor, dampening: float) -> Tensor:
    """hessians: [E, in, in] -> [E] f32, what dampening adds to their diagonals: so much is known of no input."""
    return dampening * hessians.diagonal(dim1=-2, dim2=-1).mean(-1)


def refit(weights: Tensor, found: Quantized, hessians: Tensor, dampening: float) -> Quantized:
    """The same codes with the scales that serve them better under the dampened Hessians.

    weights: [E, out, in]; hessians: [E, in, in] f32, means of x^T x, or one for all. With Q = C s a row's error
    (w - C s) H (w - C s)^T is a quadratic in its scales s: one step of conjugate gradients from those found, with its
    diagonal as the preconditioner. Solving it out gains nothing more (benchmarks/codes.py).
    """
    grouped = found.codes.float().unflatten(-1, (-1, INT4_GROUP))  # [E, out, groups, 128]
    scale = found.scale.float()
    # What only sets the direction and the length of the step is as good in BF16, whose products a GPU makes faster.
    rough = torch.bfloat16 if weights.is_cuda else torch.float32
    h = hessians.to(rough)
    own = h.unflatten(-1, (-1, INT4_GROUP)).unflatten(-3, (-1, INT4_GROUP)).diagonal(dim1=-4, dim2=-2)
    own = own.permute(0, 3, 1, 2)  # [E, groups, 128, 128], each group's part of H
    damp = damp_of(hessians, dampening).view(-1, 1, 1)
    with tf32():
        left = weights.float() - (grouped * scale.unsqueeze(-1)).flatten(-2)
        slope = ((torch.matmul(left, hessians) + damp * left).view_as(grouped) * grouped).sum(-1)
    del left
    codes = grouped.to(rough)
    curvature = (torch.einsum("ergi,egij->ergj", codes, own.expand(len(codes), -1, -1, -1)) * grouped).sum(-1)
    curvature += damp * grouped.square().sum(-1)
    step = torch.where(curvature > 0, slope / curvature, 0.0)
    moved = (grouped * step.unsqueeze(-1)).flatten(-2).to(rough)
    along = ((torch.matmul(moved, h) + damp * moved).float() * moved).sum(-1, keepdim=True)
    length = torch.where(along > 0, (step * slope).sum(-1, keepdim=True) / along, 0.0)
    better = scale + length * step
    grown = better / scale
    usable = grown.isfinite() & (grown < REFIT_AT_MOST) & (grown > 1 / REFIT_AT_MOST)
    return Quantized(found.codes, torch.where(usable, better, scale).to(torch.bfloat16))


def energy(matrices: Tensor, hessians: Tensor) -> Tensor:
    """m H m^T of every row m: matrices: [E, out, in]; hessians: [E, in, in], or one for all -> [E, out] f32."""
    m = matrices.float()
    with tf32():
        return (torch.matmul(m, hessians) * m).sum(-1)
