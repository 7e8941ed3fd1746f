"""The Triton kernel that mixes residual streams; model.py holds the same arithmetic in plain torch, for the CPU
and as the reference of the tests."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

MIX_COLUMNS = 1024


@triton.jit
def _mixed(streams, comb, post, output, mixed, hidden, OUTPUT: tl.constexpr, HC: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    for to in tl.static_range(HC):
        total = tl.zeros([COLUMNS], tl.float32)
        if OUTPUT:
            value = tl.load(output + token * hidden + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(post + token * HC + to).to(tl.float32) * value
        for of in tl.static_range(HC):
            value = tl.load(streams + (token * HC + of) * hidden + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(comb + (token * HC + of) * HC + to).to(tl.float32) * value
        tl.store(mixed + (token * HC + to) * hidden + column, total.to(mixed.dtype.element_ty), mask=inside)


def mixed(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor | None) -> Tensor:
    """As model.mixed, in F32 with one rounding at the end; a 4 x 4 product a token is no work for a GEMM."""
    *tokens, hc, hidden = streams.shape
    count = math.prod(tokens)
    streams = streams.contiguous()
    result = torch.empty_like(streams)
    _mixed[(count, triton.cdiv(hidden, MIX_COLUMNS))](
        streams,
        comb.contiguous(),
        post.contiguous(),
        streams if output is None else output.contiguous(),
        result,
        hidden,
        OUTPUT=output is not None,
        HC=hc,
        COLUMNS=MIX_COLUMNS,
    )
    return result
