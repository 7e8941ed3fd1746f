"""Attention as upstream's kernel computes it: logits and softmax in F32, and no matrix of all queries and keys.

transformers' own rounds the logits to BF16 twice and holds twenty bytes of them for every sample, head, query and key.
A query of DeepSeek-V4 sees the `sliding_window` keys up to its own, and compressed keys, one for so many tokens that
lie behind it. So some queries at a time meet the keys that they may see, and the work grows with the tokens. On a GPU
that is one kernel, v4forge/model/kernels.py, which never holds a logit outside the processor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HIDDEN = torch.finfo(torch.bfloat16).min  # in a mask, or less
LOGITS = 1 << 24  # at a time: 64 MiB in f32; 128 queries of DeepSeek-V4-Flash with 383 keys have 3 million


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query: [batch, heads, seq, head_dim]; key: [batch, 1, keys, head_dim], and value, the same tensor in DeepSeek-V4
    -> [batch, seq, heads, head_dim], and no probabilities. module.sinks: [heads] f32.

    mask: [batch or 1, 1, seq, keys], added to the logits. With a `sliding_window` the first `seq` keys are the queries'
    own, of which each sees those of its window, and the rest are compressed: then only the mask's last columns, those
    of compressed keys, are read, and the others may be left out.

    Products of the inputs as they are, summed in F32, like `sparse_attn` of upstream's inference/kernel.py; the
    probabilities are rounded to value's dtype before they meet it, as there. What a sample gets does not depend on the
    others of its batch.
    """
    if mask is not None and not mask.is_cuda:  # exp(-inf) is the same zero, found five times faster on a CPU
        mask = mask.masked_fill(mask <= HIDDEN, -torch.inf)
    compressed = key.shape[2] - query.shape[2]
    ratio = getattr(getattr(module, "compressor", None), "compress_rate", 0)
    if sliding_window is None or compressed < 0 or (compressed and not ratio):
        assert mask is not None
        return _in_pieces(query, key, value, mask, module.sinks, scaling), None
    bias = mask[..., mask.shape[-1] - compressed :] if compressed and mask is not None else None
    if query.is_cuda and not query.requires_grad:  # the kernel has no gradient
        from v4forge.model import kernels

        if kernels.attends(query, key, value):
            return kernels.attended(query, key, bias, module.sinks, scaling, sliding_window, ratio), None
    return _by_windows(query, key, value, bias, module.sinks, scaling, sliding_window), None


def _in_pieces(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor, scaling: float) -> Tensor:
    """Every query with every key, some queries of a sample at a time."""
    heads, seq = query.shape[1:3]
    rows = max(1, LOGITS // (heads * key.shape[2]))
    masks = mask.expand(len(query), -1, -1, -1)
    outputs = []
    for q, k, v, added in zip(query, key[:, 0], value[:, 0], masks, strict=True):
        keys = _keys(k)
        parts = [
            _some(q[:, i : i + rows], keys, v, added[:, i : i + rows], sinks, scaling) for i in range(0, seq, rows)
        ]
        outputs.append(torch.cat(parts, 1).transpose(0, 1))
    return torch.stack(outputs)


def _by_windows(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor, scaling: float, window: int
) -> Tensor:
    """Some queries of a sample at a time with the keys of their windows, and with all compressed ones.

    bias: [batch, 1, seq, compressed], or None where there are none."""
    heads, seq = query.shape[1:3]
    compressed = key.shape[2] - seq
    rows = max(1, min(window, LOGITS // (heads * (2 * window + compressed))))
    blocks = []
    for start in range(0, seq, rows):
        stop, first = min(start + rows, seq), max(0, start - window + 1)
        back = torch.arange(start, stop, device=key.device)[:, None] - torch.arange(first, stop, device=key.device)
        added = torch.zeros(back.shape, device=key.device).masked_fill_((back < 0) | (back >= window), -torch.inf)
        blocks.append((slice(start, stop), slice(first, stop), added))
    outputs = []
    for i, (q, k, v) in enumerate(zip(query, key[:, 0], value[:, 0], strict=True)):
        keys, parts = _keys(k), []
        for queries, own, added in blocks:
            seen, met = keys[:, own], v[own]
            if bias is not None:
                seen, met = torch.cat((seen, keys[:, seq:]), 1), torch.cat((met, v[seq:]))
                added = torch.cat((added, bias[i % len(bias), 0, queries]), 1)
            parts.append(_some(q[:, queries], seen, met, added, sinks, scaling))
        outputs.append(torch.cat(parts, 1).transpose(0, 1))
    return torch.stack(outputs)


def _keys(k: Tensor) -> Tensor:
    """k: [keys, head_dim] -> [head_dim, keys], on a CPU in F32."""
    return k.T if k.is_cuda else k.T.float()


def _some(q: Tensor, keys: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scaling: float) -> Tensor:
    """q: [heads, rows, head_dim]; keys: [head_dim, keys], on a CPU f32; v: [keys, head_dim]; mask: [rows, keys], or
    [1, rows, keys] -> like q.

    Logits are changed in place as far as a gradient allows, and go through one pass of exponentials."""
    flat = q.flatten(0, 1)
    if q.is_cuda and q.dtype == torch.bfloat16 and not q.requires_grad:  # such a product has no gradient
        logits = torch.mm(flat, keys, out_dtype=torch.float32)
    else:
        logits = flat.float() @ keys.float()
    logits = logits.view(*q.shape[:2], -1).mul_(scaling).add_(mask)
    sink = sinks.float().view(-1, 1, 1)
    peak = torch.maximum(logits.detach().amax(-1, keepdim=True), sink.detach())
    powers = logits.sub_(peak).exp_()
    total = powers.sum(-1, keepdim=True) + torch.exp(sink - peak)
    return (powers / total).to(v.dtype) @ v
