"""Queries, their own keys, compressed keys and sinks as DeepSeek-V4's attention gets them, and what it gives in F64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from v4forge.model import attention, drafts


@dataclass(frozen=True)
class Inputs:
    """One call of attention."""

    module: SimpleNamespace
    query: Tensor  # [batch, heads, seq, width]
    key: Tensor  # [batch, 1, seq + compressed, width]
    bias: Tensor  # [batch, 1, seq, compressed]
    window: int

    @property
    def scaling(self) -> float:
        return float(self.query.shape[-1] ** -0.5)

    @property
    def whole_mask(self) -> Tensor:
        """[batch, 1, seq, seq + compressed], of own keys, too."""
        own = drafts.chain_mask(self.query.shape[2], 1, self.window, self.query.dtype, self.query.device)
        return torch.cat((own.expand(len(self.query), -1, -1, -1), self.bias), -1)

    def by_windows(self) -> Tensor:
        """What the layers call."""
        mask = None if self.module.compressor is None else self.bias
        given = (self.module, self.query, self.key, self.key, mask, self.scaling)
        return attention.attention(*given, sliding_window=self.window)[0]

    def eager(self) -> Tensor:
        """Every query with every key."""
        return attention.attention(self.module, self.query, self.key, self.key, self.whole_mask, self.scaling)[0]

    def exact(self) -> Tensor:
        """In F64: a softmax over the keys and the sink, whose probability goes nowhere."""
        query, key = self.query.double(), self.key.double()
        logits = query @ key.mT * self.scaling + self.whole_mask.double()
        sinks = self.module.sinks.double().view(1, -1, 1, 1).expand(*query.shape[:3], 1)
        return (torch.cat((logits, sinks), -1).softmax(-1)[..., :-1] @ key).transpose(1, 2)


class Form(NamedTuple):
    """Of a call."""

    batch: int
    heads: int
    seq: int
    width: int
    window: int
    ratio: int = 0  # tokens to a compressed key, 0 where there are none
    picked: bool = False  # a query sees a third of those behind it only, as where an indexer chooses


def inputs(form: Form, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Inputs:
    """Random ones, whose logits are of the order of 5."""
    batch, heads, seq, width, window, ratio, picked = form
    generator = torch.Generator(device).manual_seed(seq)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    compressed = seq // ratio if ratio else 0
    ready = (torch.arange(seq, device=device) + 1) // max(ratio, 1)
    seen = (torch.arange(compressed, device=device) < ready[:, None]).expand(batch, 1, -1, -1)
    if picked:
        seen = seen & (normal(*seen.shape) < -0.4)
    return Inputs(
        SimpleNamespace(sinks=normal(heads), compressor=SimpleNamespace(compress_rate=ratio) if ratio else None),
        5 * normal(batch, seq, heads, width).to(dtype).transpose(1, 2),  # as the layer classes make them
        normal(batch, 1, seq + compressed, width).to(dtype),
        torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf),
        window,
    )
