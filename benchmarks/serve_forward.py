"""This project's streamed forward over what a server wrote: is each token its own, were the drafts to be expected?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.serve_client import Answer, Drafts
from v4forge.checkpoint.reader import Checkpoint
from v4forge.intervals import Estimate, share
from v4forge.model import drafts, evaluation
from v4forge.model.forward import Forward
from v4forge.profiling import Watch

DRAFTS = 3
# What a server's numbers may differ by from the forward in BF16 with F32 logits: its attention's activations and KV
# cache are FP8, its logits BF16 products.
LEAST_SAME = 0.95  # of its tokens are our most likely ones
MOST_OFF = 0.15  # nats, mean difference of log-probabilities over the server's most likely tokens


@dataclass(frozen=True)
class Ours:
    """Our forward over sequences of `prompt` given and `out` written tokens, teacher-forced."""

    asked: Tensor  # [sequences, out, width] f64, log-probabilities of the tokens that were asked for
    best: Tensor  # [sequences, out] f64, those of the most likely tokens
    chosen: Tensor  # [sequences, out] i64, the most likely tokens
    counts: drafts.Counts  # of all places of the sequences, as `verify --tokens` counts them
    drafted: Tensor  # [DRAFTS, sequences, prompt + out - 1] i64 (drafts.propose)


@torch.no_grad()
def forward(checkpoint: Checkpoint, text: Tensor, asked: Tensor, device: torch.device) -> Ours:
    """text: [sequences, prompt + out] int64; asked: [sequences, out, width] int64, ids at the places of the output."""
    out = asked.shape[1]
    step = max(1, evaluation.FORWARD_TOKENS[device.type] // text.shape[1])
    batches = [each.to(device) for each in text.split(step)]
    results: list[tuple[Tensor, ...]] = []
    with Forward(checkpoint, batches, device, evaluation.READ_AHEAD_BYTES, Watch(device)) as passing:
        for index in checkpoint.config.layers:
            passing.layer(index)
        root, mtp = passing.root, passing.mtp()
        for batch, streams, wanted in zip(batches, passing.streams, asked.to(device).split(step), strict=True):
            pieces = []
            for row, ids in zip(streams, wanted, strict=True):
                logits = root.final(row.unsqueeze(0), root.head)[0]
                log_p = logits[-out - 1 : -1].double().log_softmax(-1)
                pieces.append((log_p.gather(1, ids), log_p.amax(-1), logits.argmax(-1)))
            values, best, chosen = (torch.stack(each) for each in zip(*pieces, strict=True))
            drafted, last = drafts.propose(mtp, root, passing.rotary, streams, batch, DRAFTS)
            passing.refuse_nan([last], "the MTP block")
            counts = drafts.judge(drafted, chosen, batch)
            found = (values, best, chosen[:, -out - 1 : -1], counts.judged, counts.accepted, drafted)
            results.append(tuple(each.cpu() for each in found))
    # the counts and drafts have the sequences second
    along = zip((0, 0, 0, 1, 1, 1), zip(*results, strict=True), strict=True)
    asked, best, chosen, judged, accepted, drafted = (torch.cat(parts, at) for at, parts in along)
    return Ours(asked, best, chosen, drafts.Counts(judged, accepted), drafted)


def alternatives(answers: Sequence[Answer]) -> tuple[Tensor, Tensor]:
    """The written token, then the most likely ones of each place: ids and log-probabilities [answers, out, width].

    Where the server named fewer, the written token stands in again, and its log-probability.
    """
    width = 1 + max(len(place) for answer in answers for place in answer.top)
    rows = []
    for answer in answers:
        for token, logprob, place in zip(answer.tokens, answer.logprobs, answer.top, strict=True):
            row = [(token, logprob), *place.items()]
            rows.append(row + [(token, logprob)] * (width - len(row)))
    shape = (len(answers), len(answers[0].tokens), width)
    ids = torch.tensor([[token for token, _ in row] for row in rows]).view(shape)
    return ids, torch.tensor([[value for _, value in row] for row in rows], dtype=torch.float64).view(shape)


def agreement(ours: Ours, ids: Tensor, logprobs: Tensor) -> dict[str, Any]:
    """The server's tokens and log-probabilities beside ours. ids, logprobs: those of `alternatives`."""
    written = ids[:, :, 0]
    same = written == ours.chosen
    behind = ours.best - ours.asked[:, :, 0]  # by how much our forward prefers another token
    chosen_off = (ours.asked - logprobs)[:, :, 0].abs()
    off = (ours.asked - logprobs)[:, :, 1:].abs()
    agreed = share(same.sum(1).numpy(), np.full(len(same), same.shape[1]))
    found = {
        "tokens": same.numel(),
        "same": agreed.json(),
        "furthest_behind_nats": float(behind.max()),
        "written": {"mean": float(chosen_off.mean()), "max": float(chosen_off.max())},
        "most_likely": {"mean": float(off.mean()), "max": float(off.max())},
    }
    return found | {"within": bool(agreed.value >= LEAST_SAME and off.mean() <= MOST_OFF)}


def walk(drafted: Tensor, text: Tensor, prompt: int, k: int) -> list[Drafts]:
    """What a greedy server that drafts `k` tokens a step counts while it writes text[:, prompt:], by sequence.

    It is at every place once, steps over what was accepted, and so is more often where drafts are rejected than
    `verify --tokens`, which judges every place. The step that passes the end is left out: its drafts have no text.
    """
    found = []
    for row in range(len(text)):
        steps, accepted, at = 0, [0] * k, prompt - 1
        while at + 1 + k < text.shape[1]:
            steps += 1
            taken = 0
            while taken < k and drafted[taken, row, at] == text[row, at + 2 + taken]:
                accepted[taken] += 1
                taken += 1
            at += taken + 1
        found.append(Drafts(steps, tuple(accepted)))
    return found


def acceptance(counts: Sequence[Drafts]) -> list[Estimate]:
    """p_1, p_2, …: the share accepted at each place of those accepted at the place before, with 95% intervals."""
    places = np.array([[each.steps, *each.accepted] for each in counts])
    return [share(places[:, i + 1], places[:, i]) for i in range(places.shape[1] - 1)]


def drafts_table(served: Sequence[Drafts], ours: Ours, text: Tensor, prompt: int) -> list[dict[str, Any]]:
    """By place: what the server counted, what it should have counted by our forward, and what verify gives."""
    k = len(served[0].accepted)
    expected = acceptance(walk(ours.drafted, text, prompt, k))
    counts = zip(ours.counts.accepted[:k].numpy(), ours.counts.judged[:k].numpy(), strict=True)
    every = [share(accepted, judged) for accepted, judged in counts]
    rows = []
    for place, (ask, should, everywhere) in enumerate(zip(acceptance(served), expected, every, strict=True)):
        judged = sum(each.accepted[place - 1] if place else each.steps for each in served)
        rows.append(
            {
                "place": place + 1,
                "judged": judged,
                "accepted": sum(each.accepted[place] for each in served),
                "server": ask.json(),
                "forward": should.json(),
                "verify": everywhere.json(),
                "within": inside(ask, should),
                "within_verify": inside(ask, everywhere),
            }
        )
    return rows


def inside(value: Estimate, interval: Estimate) -> bool:
    """Whether a share lies in another's interval; where either was never judged, nothing speaks against it."""
    unjudged = math.isnan(value.value) or math.isnan(interval.low)
    return unjudged or interval.low <= value.value <= interval.high
