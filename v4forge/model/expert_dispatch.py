"""A layer's tokens, sorted by expert once, on their way from the ranks that hold them to the expert's rank and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v4forge.model.distributed import Ranks


class Dispatch:
    """Which rows of the experts' input each expert gets, over all ranks, and where its outputs go.

    x: [tokens, hidden] and indices: [tokens, top_k] are this rank's, whose tokens follow those of the ranks before it.
    `routed`: [tokens * top_k, hidden], the outputs that `give_back` has brought so far.
    """

    def __init__(self, ranks: Ranks, x: Tensor, indices: Tensor, experts: int) -> None:
        self._ranks, self._x, self._top_k = ranks, x, indices.shape[1]
        flat = indices.flatten()
        self._order = torch.argsort(flat, stable=True)
        self._counts = ranks.gather(torch.bincount(flat, minlength=experts).tolist())
        self._starts = [0]
        for count in self._counts[ranks.rank]:
            self._starts.append(self._starts[-1] + count)
        self._tokens = ranks.gather(len(x))
        self._sent: list[Tensor] = []
        self._received: list[list[int]] = []
        self.routed = x.new_empty(len(flat), x.shape[1])

    @property
    def counts(self) -> list[int]:
        """Tokens that each expert gets, all ranks together."""
        return [sum(each) for each in zip(*self._counts, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens of all ranks."""
        return sum(self._tokens)

    def rows(self, experts: Sequence[range]) -> list[Tensor]:
        """The input rows of this rank's experts, [n, hidden] each in the order of the global sample index.

        experts[r] are rank r's of this step; every rank calls this with the same.
        """
        self._sent = [self._order[self._starts[e.start] : self._starts[e.stop]] for e in experts]
        own = experts[self._ranks.rank]
        self._received = [counts[own.start : own.stop] for counts in self._counts]
        parts = [self._x[positions // self._top_k] for positions in self._sent]
        received = self._ranks.exchange(parts, [sum(counts) for counts in self._received])
        by_rank = [part.split(counts) for part, counts in zip(received, self._received, strict=True)]
        return [_joined(pieces) for pieces in zip(*by_rank, strict=True)]

    def give_back(self, outputs: Sequence[Tensor]) -> None:
        """Sends the outputs of the rows of the last step, in their form and order, into every rank's `routed`."""
        counts = zip(*self._received, strict=True)
        by_expert = [output.split(list(each)) for output, each in zip(outputs, counts, strict=True)]
        parts = [
            _joined([pieces[r] for pieces in by_expert]) if by_expert else self._x[:0] for r in range(self._ranks.size)
        ]
        for positions, rows in zip(self._sent, self._ranks.exchange(parts, [len(s) for s in self._sent]), strict=True):
            self.routed[positions] = rows

    def everything(self) -> Tensor:
        """All ranks' rows of x, in order, [tokens, hidden]."""
        return self._x if self._ranks.size == 1 else self._ranks.everyones(self._x, self._tokens)

    def sample(self, count: int) -> Tensor:
        """About `count` rows of x evenly spaced over all ranks' tokens, in order."""
        stride = max(1, self.tokens // count)
        before = [sum(self._tokens[:r]) for r in range(self._ranks.size)]
        firsts = [-start % stride for start in before]
        counts = [len(range(first, n, stride)) for first, n in zip(firsts, self._tokens, strict=True)]
        rows = self._x[firsts[self._ranks.rank] :: stride]
        return self._ranks.everyones(rows, counts)


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
