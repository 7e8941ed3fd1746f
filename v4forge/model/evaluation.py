"""Checkpoints compared on the same tokens, layer by layer: perplexity, divergence from the first, draft acceptance.

One pass: every weight is read once, and memory is one layer plus the residual streams of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError
from v4forge.intervals import Estimate, Figure, ratio, share
from v4forge.model import drafts
from v4forge.model.forward import Forward
from v4forge.profiling import Watch

FORWARD_TOKENS = {"cuda": 4096, "cpu": 1024}  # of a pass through a layer; on a CPU more is slower
READ_AHEAD_BYTES = 4 << 30  # of all checkpoints together
DRAFTS = 3
Progress = Callable[[int, str], None]


def _noop(_done: int, _what: str) -> None:
    return None


@dataclass(frozen=True)
class Quality:
    """A model over held-out tokens, teacher-forced; each token but a sequence's first, beside the first model's.

    Rows of shorter sequences end in NaN.
    """

    nll: Tensor  # [sequences, longest - 1] f64, nats
    kl: Tensor  # [sequences, longest - 1] f64, nats: KL(first model || this one) of the distributions
    agrees: Tensor  # [sequences, longest - 1] f64, 1 where the most likely token is the first model's, else 0
    judged: Tensor  # [drafts, sequences] i64, drafts that could be judged (v4forge.model.drafts)
    accepted: Tensor  # [drafts, sequences] i64, those of them that were accepted

    @classmethod
    def blank(cls, sequences: int, longest: int, count: int) -> Quality:
        """To be filled."""
        values = torch.full((3, sequences, longest), math.nan, dtype=torch.float64)
        return cls(*values.unbind(), *torch.zeros(2, count, sequences, dtype=torch.int64).unbind())

    @property
    def tokens(self) -> int:
        return int(self.nll.isfinite().sum())

    @property
    def perplexity(self) -> float:
        return math.exp(mean(self.nll).value)

    @property
    def mtp_acceptance(self) -> float:
        """Share of positions where the MTP block's first greedy draft is the main model's greedy token."""
        return int(self.accepted[0].sum()) / int(self.judged[0].sum())

    def acceptance(self) -> list[Figure]:
        """p_1, p_2, …: the share of drafts accepted at each step, where those before were."""
        return [ratio(a, j) for a, j in zip(self.accepted.numpy(), self.judged.numpy(), strict=True)]

    def accepted_share(self, k: int) -> Estimate:
        """p_k, with the interval of a share."""
        return share(self.accepted[k - 1].numpy(), self.judged[k - 1].numpy())

    def accepted_per_step(self, count: int) -> Figure:
        """Drafts accepted of `count` a step of the server: p_1 + p_1 p_2 + …; NaN where the text left one unjudged."""
        chain, *rest = self.acceptance()[:count]
        total = chain
        for each in rest:
            if not chain.value:
                break
            chain = chain * each
            total = total + chain
        return total


def mean(values: Tensor) -> Figure:
    """values: [sequences, longest - 1], NaN behind a sequence's end -> their mean over all tokens."""
    return ratio(values.nansum(1).numpy(), values.isfinite().sum(1).numpy())


def step_count(models: Sequence[Checkpoint]) -> int:
    """How many steps `compare` reports: the layers, the head, each model's MTP block."""
    return len(models[0].config.layers) + 1 + len(models)


@torch.no_grad()
def compare(
    models: Sequence[Checkpoint],
    tokens: Tensor | Sequence[Tensor],
    device: torch.device,
    progress: Progress = _noop,
    watch: Watch | None = None,
    count: int = DRAFTS,
    given: Sequence[int] = (),
) -> list[Quality]:
    """The models, sources or artifacts, beside the first. tokens: [sequences, seq_len] int64, or sequences of any
    lengths above count + 1; `count` drafts a position; given: how many tokens of each were a server's prompt, behind
    which its drafts are judged (drafts.judge). Spans of `watch` have layer numbers, the head and the MTP block
    that of the layer behind the last.

    Raises UserError for a broken checkpoint, models that do not belong together, and numbers that are not finite.
    """
    sequences, watch = list(tokens), watch or Watch(device)
    if min(map(len, sequences), default=0) < count + 2:
        raise UserError(f"a sequence has fewer than {count + 2} tokens", f"{count} drafts need {count + 2}")
    _refuse_different(models)
    longest, layers = max(map(len, sequences)), models[0].config.layers
    batches = _micro_batches(sequences, FORWARD_TOKENS[device.type])
    texts = [torch.stack([sequences[row] for row in rows]).to(device) for rows in batches]
    found = [Quality.blank(len(sequences), longest - 1, count) for _ in models]
    with ExitStack() as stack:
        ahead = READ_AHEAD_BYTES // len(models)
        passes = [stack.enter_context(Forward(each, texts, device, ahead, watch)) for each in models]
        for index in layers:
            progress(index, f"layer {index + 1}/{len(layers)}")
            watch.begin(index)
            for each in passes:
                each.layer(index)
        watch.begin(len(layers))
        progress(len(layers), "head")
        with watch.compute("head"):
            choices = [_score(passes, n, texts[n], rows, found) for n, rows in enumerate(batches)]
        for number, (each, quality) in enumerate(zip(passes, found, strict=True)):
            progress(len(layers) + 1 + number, "MTP block")
            mtp = each.mtp()
            with watch.compute("drafts"):
                for text, rows, streams, chosen in zip(texts, batches, each.streams, choices, strict=True):
                    drafted, last = drafts.propose(mtp, each.root, each.rotary, streams, text, count)
                    each.refuse_nan([last], "the MTP block")
                    prompts = torch.tensor([given[row] for row in rows]) if given else None
                    counts = drafts.judge(drafted, chosen[number], text, prompts)
                    quality.judged[:, rows], quality.accepted[:, rows] = counts.judged.cpu(), counts.accepted.cpu()
            del mtp
    return found


def evaluate(checkpoint: Checkpoint, tokens: Tensor, device: torch.device, progress: Progress = _noop) -> Quality:
    """One model by itself, with one draft a position."""
    return compare([checkpoint], tokens, device, progress, count=1)[0]


def _refuse_different(models: Sequence[Checkpoint]) -> None:
    first = models[0]
    for other in models[1:]:
        for what in ("vocab_size", "num_hidden_layers"):
            a, b = (getattr(each.config, what) for each in (first, other))
            if a != b:
                raise UserError(
                    f"{first.directory} has {what} {a}, {other.directory} has {b}",
                    "compare an artifact with the source that it was made from",
                )


def _micro_batches(sequences: Sequence[Tensor], tokens: int) -> list[list[int]]:
    """Which sequences go through a layer together: some of one length, of about `tokens` tokens."""
    by_length: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        by_length.setdefault(len(sequence), []).append(row)
    batches = []
    for length, rows in by_length.items():
        step = max(1, tokens // length)
        batches += [rows[start : start + step] for start in range(0, len(rows), step)]
    return batches


def _score(
    passes: Sequence[Forward], number: int, text: Tensor, rows: list[int], found: Sequence[Quality]
) -> list[Tensor]:
    """Writes micro-batch `number` of nll, kl and agrees -> each model's most likely tokens, [batch, seq].

    text: [batch, seq]. In float64, all models' logits of some tokens at a time.
    """
    following = text.roll(-1, 1).flatten()  # the last column's is not used
    columns: list[list[tuple[Tensor, ...]]] = [[] for _ in passes]
    for start in range(0, len(following), drafts.ROWS):
        some = slice(start, start + drafts.ROWS)
        reference: Tensor | None = None
        for each, column in zip(passes, columns, strict=True):
            logits = each.root.final(each.streams[number].flatten(0, 1)[some].unsqueeze(0), each.root.head)[0]
            each.refuse_nan([logits], "the head")
            log_p = logits.double().log_softmax(-1)
            reference = log_p if reference is None else reference
            nll = -log_p.gather(1, following[some, None])[:, 0]
            column.append((nll, divergence(reference, log_p), logits.argmax(-1)))
    chosen = []
    for quality, column in zip(found, columns, strict=True):
        nll, kl, choices = (torch.cat(pieces).view_as(text) for pieces in zip(*column, strict=True))
        chosen.append(choices)
        values = {"nll": nll, "kl": kl, "agrees": (choices == chosen[0]).double()}
        for name, value in values.items():
            getattr(quality, name)[rows, : text.shape[1] - 1] = value[:, :-1].cpu()
    return chosen


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of distributions over the last dimension, given their logarithms in f64."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def figures(qualities: Sequence[Quality], names: Sequence[str] = ("source", "artifact")) -> dict[str, Any]:
    """Every figure with its 95% interval over sequences, as JSON; null where there is but one sequence."""
    lengths = sorted({int(n) + 1 for n in qualities[0].nll.isfinite().sum(1)})
    return {
        "tokens": qualities[0].tokens,
        "sequences": len(qualities[0].nll),
        "seq_len": lengths[0] if len(lengths) == 1 else [lengths[0], lengths[-1]],
        "models": {name: _figures(q, qualities[0]) for name, q in zip(names, qualities, strict=True)},
    }


def _figures(quality: Quality, first: Quality) -> dict[str, Any]:
    found: dict[str, Any] = {"perplexity": mean(quality.nll).interval().mapped(math.exp).json()}
    if quality is not first:
        kl = mean(quality.kl).interval().json()
        found |= {
            "perplexity_change_percent": perplexity_change(quality, first).json(),
            "top1_agreement": agreement(quality).json(),
            "kl_nats": {"mean": kl, "p99": percentile(quality.kl, 0.99)},
        }
    return found | {"drafts": [_draft_figures(quality, k) for k in range(1, len(quality.judged) + 1)]}


def _draft_figures(quality: Quality, k: int) -> dict[str, Any]:
    step = quality.accepted_per_step(k)
    return {
        "k": k,
        "judged": int(quality.judged[k - 1].sum()),
        "accepted": int(quality.accepted[k - 1].sum()),
        "acceptance_after_accepted": quality.accepted_share(k).json(),
        "accepted_per_step": step.interval().json(),
        "acceptance_rate": step.over(k).interval().json(),
    }


def perplexity_change(quality: Quality, first: Quality) -> Estimate:
    """Percent, paired token by token."""
    return mean(quality.nll - first.nll).interval().mapped(lambda nats: 100 * math.expm1(nats))


def agreement(quality: Quality) -> Estimate:
    """Share of tokens for which the most likely one is the first model's."""
    return share(quality.agrees.nansum(1).numpy(), quality.agrees.isfinite().sum(1).numpy())


def percentile(values: Tensor, level: float) -> float:
    """The smallest of the values, NaN left out, that at least this share of them does not exceed."""
    finite = values[values.isfinite()].sort().values
    return float(finite[math.ceil(level * len(finite)) - 1])


def _shown(estimate: Estimate, digits: str, unit: str = "") -> str:
    if math.isnan(estimate.value):
        return "not judged"
    ends = "" if math.isnan(estimate.low) else f" ({estimate.low:{digits}}..{estimate.high:{digits}})"
    return f"{estimate.value:{digits}}{unit}{ends}"


def _percent(estimate: Estimate) -> str:
    return _shown(estimate.mapped(lambda value: 100 * value), ".1f", "%")


# heading, what it says of a model beside the first one, and whether it says something of the first itself
ROWS: tuple[tuple[str, Callable[[Quality, Quality], str], bool], ...] = (
    ("perplexity", lambda q, _: _shown(mean(q.nll).interval().mapped(math.exp), ".3f"), True),
    ("  change", lambda q, first: _shown(perplexity_change(q, first), "+.2f", "%"), False),
    ("same most likely token", lambda q, _: _percent(agreement(q)), False),
    ("KL divergence, nats", lambda q, _: _shown(mean(q.kl).interval(), ".4f"), False),
    ("  99% of tokens below", lambda q, _: f"{percentile(q.kl, 0.99):.4f}", False),
)


def table(qualities: Sequence[Quality], names: Sequence[str] = ("source", "artifact")) -> Table:
    """The figures with their 95% intervals for a terminal, a column a model."""
    first = qualities[0]
    caption = f"95% intervals over {len(first.nll):,} sequences, {first.tokens + len(first.nll):,} tokens together"
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=caption, caption_justify="left")
    drawn.add_column("", no_wrap=True)
    for name in names:
        drawn.add_column(name, overflow="fold")  # of three models an interval is wider than its column
    for heading, text, of_first in ROWS:
        if of_first or len(qualities) > 1:
            drawn.add_row(heading, *(text(q, first) if of_first or q is not first else "" for q in qualities))
    steps = range(1, len(first.judged) + 1)
    for k in steps:
        heading = f"  then draft {k}" if k > 1 else "draft 1 accepted"
        drawn.add_row(heading, *(_percent(q.accepted_share(k)) for q in qualities))
    for k in steps:
        drawn.add_row(f"accepted of {k} a step", *(_shown(q.accepted_per_step(k).interval(), ".3f") for q in qualities))
    return drawn


def unigram_perplexity(tokens: Tensor) -> float:
    """exp of the token distribution's entropy: the best that any model without context can do on these tokens."""
    share = torch.bincount(tokens.flatten()).double() / tokens.numel()
    return math.exp(-float((share * share.log()).nan_to_num().sum()))
