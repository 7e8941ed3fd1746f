"""Greedy drafts of the MTP block, k tokens ahead of every position at once, and which of them the model accepts.

As vLLM drafts: from position t, whose streams the main model has made and after which token t + 1 is known, the block
drafts token t + 2; then it is applied to its own output streams and its own draft, one position further, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from v4forge.model import deepseek_v4
from v4forge.model.mtp import MTPBlock

ROWS = 1024  # of logits at a time: 129,280 wide they take 0.5 GB in f32


class Keys:
    """The keys, which are also the values, of the steps so far; transformers' attention calls `update`."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def update(self, keys: Tensor, _values: Tensor, _layer: int) -> tuple[Tensor, Tensor]:
        """keys: [batch, 1, rows, head_dim] of this step -> those of all steps, twice."""
        self._steps.append(keys)
        seen = torch.cat(self._steps, dim=2)
        return seen, seen


def chain_mask(rows: int, step: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of step `step` (from 1): [1, 1, rows, step * rows], 0 or the lowest number.

    Row t of a step is at position t + step - 1. It sees the first step's rows up to t, made from the main model's
    streams, where they lie in its window (a key counts when it is less than `window` positions back), and row t of the
    later steps: as in serving, where drafts overwrite what was behind the last accepted token.
    """
    row = torch.arange(rows, device=device)
    first = (row <= row[:, None]) & (row > row[:, None] + step - 1 - window)
    own = torch.eye(rows, dtype=torch.bool, device=device)
    later = [own if step - m < window else torch.zeros_like(own) for m in range(2, step + 1)]
    seen = torch.cat((first, *later), dim=1)
    lowest = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, lowest)[None, None]


def greedy(head: deepseek_v4.Head, streams: Tensor, weight: Tensor) -> Tensor:
    """The token of the largest logit, [batch, seq]; streams: [batch, seq, hc_mult, hidden], weight: [vocab, hidden]."""
    parts = streams.flatten(0, 1).split(ROWS)
    return torch.cat([head(part.unsqueeze(0), weight)[0].argmax(-1) for part in parts]).view(streams.shape[:2])


def propose(
    mtp: MTPBlock, root: deepseek_v4.Root, rotary: deepseek_v4.Rotary, streams: Tensor, tokens: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Drafts of `count` steps from every position but the last, [count, batch, seq - 1] int64, and the last streams.

    tokens: [batch, seq]; streams: [batch, seq, hc_mult, hidden], the main model's. Draft i (from 1) at row t is for
    position t + 1 + i. A step is one pass of the block, whose rows see keys of the steps before.
    """
    following, streams, keys = tokens[:, 1:], streams[:, :-1], Keys()
    rows = torch.arange(following.shape[1], device=tokens.device).unsqueeze(0)
    drafts = []
    for step in range(1, count + 1):
        at = rows + step - 1
        mask = chain_mask(rows.shape[1], step, rotary.config.sliding_window, streams.dtype, tokens.device)
        context = deepseek_v4.Context(following, at, rotary.embeddings(at), mask, keys)
        streams = mtp(streams, F.embedding(following, root.embed), context)
        following = greedy(mtp.head, streams, root.head)
        drafts.append(following)
    return torch.stack(drafts), streams


@dataclass(frozen=True)
class Counts:
    """Of each sequence, by step: drafts that could be judged, and those of them that were accepted. [count, batch]."""

    judged: Tensor
    accepted: Tensor


def judge(drafts: Tensor, choices: Tensor, tokens: Tensor, given: Tensor | None = None) -> Counts:
    """Compares drafts [count, batch, seq - 1] of the text `tokens` [batch, seq] with the main model's greedy `choices`
    [batch, seq], of which row j is for position j + 1. given: [batch], how many tokens of each text were a prompt: a
    server drafts first behind its own first token, so only what is drafted from there on is judged.

    Draft i is accepted when it is the choice for its position and the drafts before it were accepted. The choices were
    made after the text, so draft i > 1 can be judged only where the text went on with the accepted drafts before it.
    On what a greedy server wrote that is wherever they were accepted. On other text the rest stays unknown, and what is
    judged leans towards text that the model foresees.
    """
    judged, accepted = [], []
    alive = torch.ones_like(tokens[:, 1:], dtype=torch.bool)  # row t: the text follows the drafts from there so far
    if given is not None:
        alive &= torch.arange(alive.shape[1], device=tokens.device) >= given.to(tokens.device)[:, None] - 1
    for ahead, draft in enumerate(drafts, start=1):
        rows = tokens.shape[1] - ahead  # from which position t + 1 + ahead has a choice
        right = alive[:, :rows] & (draft[:, :rows] == choices[:, ahead:])
        judged.append(alive[:, :rows].sum(1))
        accepted.append(right.sum(1))
        alive = right[:, :-1] & (draft[:, : rows - 1] == tokens[:, ahead + 1 :])
    return Counts(torch.stack(judged), torch.stack(accepted))
