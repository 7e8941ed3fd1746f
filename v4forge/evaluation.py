"""Perplexity and greedy draft acceptance of a checkpoint, source or artifact, one layer at a time.

Memory is one layer plus the residual streams of the tokens; the weights are read once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from v4forge import model
from v4forge.checkpoint import Checkpoint

MICRO_BATCH = 2  # sequences a forward pass; on a CPU more is slower


@dataclass(frozen=True)
class Quality:
    """Over held-out tokens, teacher-forced."""

    nll: Tensor  # [sequences, seq_len - 1] f64, nats, of each token but the first
    mtp_acceptance: float  # share of positions where the MTP block's greedy draft is the main model's greedy token

    @property
    def tokens(self) -> int:
        return self.nll.numel()

    @property
    def perplexity(self) -> float:
        return math.exp(float(self.nll.mean()))

    def change_from(self, other: Quality) -> tuple[float, float]:
        """Percent by which perplexity differs from that of `other` on the same tokens, and its standard error."""
        difference = (self.nll - other.nll).mean(1)
        ratio = math.exp(float(difference.mean()))
        error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
        return 100 * (ratio - 1), 100 * ratio * error


@torch.no_grad()
def evaluate(
    checkpoint: Checkpoint,
    tokens: Tensor,
    device: torch.device,
    progress: Callable[[int, str], None] = lambda _done, _what: None,
) -> Quality:
    """tokens: [sequences, seq_len] int64. The draft for position t + 2 reads the streams at t and the true token t + 1;
    it is accepted when it equals the main model's greedy choice after t + 1. Raises UserError for a broken checkpoint.
    """
    weights = model.Weights(checkpoint, device)
    config = model.hf_config(checkpoint.config)
    rotary = model.Rotary(config, device, weights.dtype)
    root = model.load_root(weights, config)
    batches = list(tokens.to(device).split(MICRO_BATCH))
    streams = [model.embed(root, config, batch) for batch in batches]
    for index in checkpoint.config.layers:
        progress(index, f"layer {index + 1}/{len(checkpoint.config.layers)}")
        layer = model.load_layer(weights, config, index)
        streams = [model.run_layer(layer, s, rotary.context(batch)) for s, batch in zip(streams, batches, strict=True)]
        del layer
    progress(len(checkpoint.config.layers), "head and MTP block")
    mtp = model.load_mtp(weights, config)
    nll: list[Tensor] = []
    accepted = 0
    for s, batch in zip(streams, batches, strict=True):
        logits = root.final(s, root.head)
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="none")
        nll.append(each.view(len(batch), -1).cpu())
        following = rotary.context(batch[:, 1:])
        drafted = mtp(s[:, :-1], F.embedding(following.input_ids, root.embed), following)
        drafts = mtp.head(drafted, root.head).argmax(-1)
        accepted += int((drafts == logits[:, 1:].argmax(-1)).sum())
    every = torch.cat(nll)
    return Quality(every, accepted / every.numel())


def unigram_perplexity(tokens: Tensor) -> float:
    """exp of the token distribution's entropy: the best that any model without context can do on these tokens."""
    share = torch.bincount(tokens.flatten()).double() / tokens.numel()
    return math.exp(-float((share * share.log()).nan_to_num().sum()))
