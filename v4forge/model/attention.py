"""Attention as upstream's kernel computes it: logits and softmax in F32, some queries of a sample at a time.

transformers' own rounds the logits to BF16 twice and holds twenty bytes of them for every sample, head, query and key.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS = 1 << 25  # at a time: 128 MiB in f32; a sample of 512 tokens of DeepSeek-V4-Flash has 21 million


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """query: [batch, heads, seq, head_dim]; key, value: [batch, 1, keys, head_dim]; mask: [batch or 1, 1, seq, keys],
    added to the logits -> [batch, seq, heads, head_dim], and no probabilities. module.sinks: [heads] f32.

    Products of the inputs as they are, summed in F32, like `sparse_attn` of upstream's inference/kernel.py; the
    probabilities are rounded to value's dtype before they meet it, as there. What a sample gets does not depend on the
    others of its batch.
    """
    heads, seq = query.shape[1:3]
    rows = max(1, LOGITS // (heads * key.shape[2]))
    masks = mask.expand(len(query), -1, -1, -1)
    outputs = []
    for q, k, v, added in zip(query, key[:, 0], value[:, 0], masks, strict=True):
        keys = k.T if k.is_cuda else k.T.float()
        parts = [
            _some(q[:, i : i + rows], keys, v, added[:, i : i + rows], module.sinks, scaling)
            for i in range(0, seq, rows)
        ]
        outputs.append((parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(0, 1))
    return torch.stack(outputs), None


def _some(q: Tensor, keys: Tensor, v: Tensor, mask: Tensor, sinks: Tensor, scaling: float) -> Tensor:
    """q: [heads, rows, head_dim]; keys: [head_dim, keys], on a CPU f32; v: [keys, head_dim] -> like q.

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
