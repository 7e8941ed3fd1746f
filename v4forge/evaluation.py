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

MICRO_BATCH = 8  # sequences a forward pass


@dataclass(frozen=True)
class Quality:
    """Over held-out tokens, teacher-forced."""

    tokens: int
    perplexity: float
    mtp_acceptance: float  # share of positions where the MTP block's greedy draft is the main model's greedy token


@torch.no_grad()
def evaluate(
    checkpoint: Checkpoint,
    tokens: Tensor,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
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
        progress(f"layer {index + 1}/{len(checkpoint.config.layers)}")
        layer = model.load_layer(weights, config, index)
        streams = [model.run_layer(layer, s, rotary.context(batch)) for s, batch in zip(streams, batches, strict=True)]
        del layer
    progress("head and MTP block")
    mtp = model.load_mtp(weights, config)
    nll = accepted = 0.0
    for s, batch in zip(streams, batches, strict=True):
        logits = root.final(s, root.head)
        nll += float(F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="sum"))
        following = rotary.context(batch[:, 1:])
        drafted = mtp(s[:, :-1], F.embedding(following.input_ids, root.embed), following)
        drafts = mtp.head(drafted, root.head).argmax(-1)
        accepted += float((drafts == logits[:, 1:].argmax(-1)).sum())
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return Quality(predicted, math.exp(nll / predicted), accepted / predicted)


def unigram_perplexity(tokens: Tensor) -> float:
    """exp of the token distribution's entropy: the best that any model without context can do on these tokens."""
    share = torch.bincount(tokens.flatten()).double() / tokens.numel()
    return math.exp(-float((share * share.log()).nan_to_num().sum()))
