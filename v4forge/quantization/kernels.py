"""Triton kernels for what torch is slow at: the search of scales, one block of the GPTQ sweep.

gptq.py holds the same arithmetic in plain torch, for the CPU and as the reference of the tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4forge.checkpoint.formats import INT4_GROUP

ROUNDER = tl.constexpr(1.5 * 2**23)  # added and taken away again it rounds to the nearest integer, ties to even
SEARCH_ROWS = 32
SWEEP_ROWS = 32


@triton.jit
def _nearest_code(value, step):
    code = tl.minimum(tl.maximum(tl.div_rn(value, step), -8.0), 7.0)
    return (code + ROUNDER) - ROUNDER


@triton.jit
def _searched_scales(
    weights,
    importance,
    widest,
    factors,
    best_scale,
    rows,
    columns,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, expert = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = group * G + tl.arange(0, G)
    inside = row < rows
    groups = columns // G
    w = tl.load(
        weights + (expert * rows + row[:, None]) * columns + column[None, :], mask=inside[:, None], other=0.0
    ).to(tl.float32)
    h = tl.load(importance + expert * columns + column)
    where = (expert * rows + row) * groups + group
    wide = tl.load(widest + where, mask=inside, other=1.0).to(tl.float32)
    best = wide
    most = tl.zeros([ROWS], tl.float32)
    weighted = w * h[None, :]
    for i in range(N):
        # a product with the reciprocal finds another code only at a tie, where both are as good
        steps = w * (1.0 / (wide * tl.load(factors + i)))[:, None]
        for sign in tl.static_range(2):
            code = tl.minimum(tl.maximum(steps if sign == 0 else -steps, -8.0), 7.0)
            code = (code + ROUNDER) - ROUNDER
            along = tl.sum(weighted * code, axis=1)
            size = tl.sum(code * code * h[None, :], axis=1)
            fitted = tl.div_rn(along, size)
            bounded = tl.minimum(tl.maximum(tl.abs(fitted), wide * LEAST), wide * MOST)
            scale = tl.where(fitted < 0, -bounded, bounded)
            explained = scale * (2 * along - scale * size)
            better = explained > most
            best = tl.where(better, scale, best)
            most = tl.where(better, explained, most)
    tl.store(best_scale + where, best, mask=inside)


def searched_scales(weights: Tensor, importance: Tensor, widest: Tensor, grid: tuple[float, ...]) -> Tensor:
    """As gptq.searched_scales; widest: [E, out, in/128] bf16, the scales that the factors of `grid` multiply."""
    experts, rows, columns = weights.shape
    factors = torch.tensor(grid, dtype=torch.float32, device=weights.device)
    best = torch.empty_like(widest, dtype=torch.float32)
    _searched_scales[(triton.cdiv(rows, SEARCH_ROWS), columns // INT4_GROUP, experts)](
        weights.contiguous(),
        importance.contiguous(),
        widest,
        factors,
        best,
        rows,
        columns,
        LEAST=min(grid),
        MOST=max(grid),
        N=len(grid),
        ROWS=SEARCH_ROWS,
        G=INT4_GROUP,
    )
    return best.to(torch.bfloat16)


@triton.jit
def _sweep_block(
    carried,
    ordered,
    lower,
    scale,
    group_of,
    residual,
    codes,
    start,
    rows,
    columns,
    groups,
    lower_stride,
    group_stride,
    CARRIED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = row < rows
    mask = inside[:, None]
    at = (expert * rows + row[:, None]) * columns + start + column[None, :]
    target = tl.load(ordered + at, mask=mask, other=0.0).to(tl.float32)
    if CARRIED:
        target += tl.load(carried + (expert * rows + row[:, None]) * WIDTH + column[None, :], mask=mask, other=0.0)
    scale_row = scale + (expert * rows + row) * groups
    for i in range(WIDTH):
        k = WIDTH - 1 - i
        here = column[None, :] == k
        wanted = tl.sum(tl.where(here, target, 0.0), axis=1)
        group = tl.load(group_of + expert * group_stride + start + k)
        step = tl.load(scale_row + group, mask=inside, other=1.0).to(tl.float32)
        original = tl.load(ordered + (expert * rows + row) * columns + start + k, mask=inside, other=0.0).to(tl.float32)
        value = _nearest_code(wanted, step) * step
        left = original - value
        # the factor's row is zero above its diagonal, so later columns keep their residual
        l_row = tl.load(lower + expert * lower_stride + (start + k).to(tl.int64) * columns + start + column)
        target = tl.where(here, left[:, None], target + left[:, None] * l_row[None, :])
    tl.store(residual + at, target, mask=mask)
    group = tl.load(group_of + expert * group_stride + start + column)
    steps = tl.load(scale_row[:, None] + group[None, :], mask=mask, other=1.0).to(tl.float32)
    original = tl.load(ordered + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(codes + at, _nearest_code(original - target, steps).to(tl.int8), mask=mask)


def sweep_block(
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
    """As gptq._sweep_block; `lower` and `group_of` may be one matrix expanded to all experts."""
    experts, rows, columns = ordered.shape
    _sweep_block[(triton.cdiv(rows, SWEEP_ROWS), experts)](
        carried if carried is not None else residual,
        ordered,
        lower,
        scale,
        group_of,
        residual,
        codes,
        start,
        rows,
        columns,
        scale.shape[-1],
        lower.stride(0),
        group_of.stride(0),
        CARRIED=carried is not None,
        ROWS=SWEEP_ROWS,
        WIDTH=end - start,
        num_warps=1,
    )
