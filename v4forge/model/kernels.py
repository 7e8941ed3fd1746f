"""The Triton kernels that mix residual streams and that attend; deepseek_v4.py and attention.py hold the same
arithmetic in plain torch, for the CPU and as the reference of the tests."""

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


# Of attention, a program's: rows are queries times heads, which share their keys; with 512 columns of F32 sums they
# fill half the registers of a Hopper GPU's multiprocessor.
QUERIES, HEADS, KEYS, WARPS, STAGES = 16, 4, 32, 8, 3
LOG2_E = tl.constexpr(math.log2(math.e))  # logits are in powers of two


@triton.jit
def _attended(
    query,
    key,
    bias,
    sinks,
    output,
    seq,
    compressed,
    ratio,
    scale,
    query_sample,
    query_head,
    query_token,
    key_sample,
    bias_sample,
    bias_token,
    heads,
    WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    sample = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * QUERIES
    row = tl.arange(0, QUERIES * HEADS)
    token = first + row // HEADS
    head = tl.program_id(0) * HEADS + row % HEADS
    inside = token < seq
    column = tl.arange(0, WIDTH)
    place = sample * query_sample + head.to(tl.int64) * query_head + token.to(tl.int64) * query_token
    q = tl.load(query + place[:, None] + column[None, :], mask=inside[:, None], other=0.0)
    peak = tl.load(sinks + head).to(tl.float32) * LOG2_E  # a sink is a key whose value is zero
    total = tl.full([QUERIES * HEADS], 1.0, tl.float32)
    sums = tl.zeros([QUERIES * HEADS, WIDTH], tl.float32)
    ready = (token + 1) // ratio
    start = tl.maximum(first - WINDOW + 1, 0)
    end = tl.minimum(first + QUERIES, seq)
    own = tl.cdiv(end - start, KEYS)
    others = tl.cdiv(tl.minimum(end // ratio, compressed), KEYS)
    for step in range(0, own + others):
        in_window = step < own
        number = tl.where(in_window, start + step * KEYS, (step - own) * KEYS) + tl.arange(0, KEYS)
        there = tl.where(in_window, number < end, number < compressed)
        at = tl.where(in_window, number, number + seq).to(tl.int64)
        k = tl.load(key + sample * key_sample + at[:, None] * WIDTH + column[None, :], mask=there[:, None], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        back = token[:, None] - number[None, :]
        visible = tl.where(in_window, (back >= 0) & (back < WINDOW), number[None, :] < ready[:, None])
        visible = visible & there[None, :]
        if BIAS:
            added = bias + sample * bias_sample + token.to(tl.int64)[:, None] * bias_token + number[None, :]
            chosen = visible & (step >= own) & inside[:, None]
            logits += tl.load(added, mask=chosen, other=0.0).to(tl.float32) * LOG2_E
        logits = tl.where(visible, logits, -float("inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        powers = tl.exp2(logits - higher[:, None])
        shrunk = tl.exp2(peak - higher)
        total = total * shrunk + tl.sum(powers, 1)
        sums = tl.dot(powers.to(k.dtype), k, sums * shrunk[:, None], input_precision="ieee")
        peak = higher
    place = ((sample * seq + token) * heads + head) * WIDTH
    result = (sums / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + place[:, None] + column[None, :], result, mask=inside[:, None])


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attended` takes these: BF16 of a width that is a power of two, and a GPU whose processors hold them."""
    width = query.shape[-1]
    if query.dtype != torch.bfloat16 or width & (width - 1) or width < 16 or query.shape[1] % HEADS:
        return False
    held = (QUERIES * HEADS + STAGES * KEYS) * width * query.element_size() + (16 << 10)
    there = getattr(torch.cuda.get_device_properties(query.device), "shared_memory_per_block_optin", 48 << 10)
    return value.data_ptr() == key.data_ptr() and held <= there


def attended(
    query: Tensor, key: Tensor, bias: Tensor | None, sinks: Tensor, scaling: float, window: int, ratio: int
) -> Tensor:
    """As attention.attention with a sliding window, whose keys are its values, too. bias: [batch or 1, 1, seq,
    compressed], or None; `ratio` tokens make a compressed key -> [batch, seq, heads, head_dim]."""
    batch, heads, seq, width = query.shape
    compressed = key.shape[2] - seq
    key = key.contiguous()
    query = query if query.stride(-1) == 1 else query.contiguous()
    if bias is not None:
        bias = (bias if bias.stride(-1) == 1 else bias.contiguous()).expand(batch, -1, -1, -1)
    result = torch.empty(batch, seq, heads, width, dtype=query.dtype, device=query.device)
    _attended[(heads // HEADS, triton.cdiv(seq, QUERIES), batch)](
        query,
        key,
        sinks if bias is None else bias,
        sinks,
        result,
        seq,
        compressed,
        max(ratio, 1),
        scaling * LOG2_E.value,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        key.stride(0),
        0 if bias is None else bias.stride(0),
        0 if bias is None else bias.stride(2),
        heads,
        WINDOW=window,
        WIDTH=width,
        BIAS=bias is not None,
        QUERIES=QUERIES,
        HEADS=HEADS,
        KEYS=KEYS,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return result
