"""What vLLM's /metrics says, as plain values: counters to add and subtract, gauges, and which process says it.

A value is None where the server does not export it: a server without speculation has no acceptance, not one of 0%.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from v4forge.errors import UserError

Value = float | None


@dataclass(frozen=True)
class Counts:
    """Counters since a process began, or what was added to them between two readings."""

    prompted: Value = None  # tokens of prompts
    generated: Value = None  # tokens of answers
    drafts: Value = None  # times that the drafter was asked; each proposes k tokens
    draft_tokens: Value = None
    accepted: Value = None
    accepted_at: tuple[float, ...] | None = None  # accepted tokens by position in their draft

    @property
    def acceptance(self) -> Value:
        """The share of draft tokens that were accepted; None where none were proposed."""
        return _over(self.accepted, self.draft_tokens)

    @property
    def acceptance_at(self) -> tuple[float, ...] | None:
        """The share of drafts whose first, second, … token was accepted; None where there were none."""
        return tuple(at / self.drafts for at in self.accepted_at) if self.accepted_at and self.drafts else None

    def since(self, earlier: Counts) -> Counts:
        """What was added after `earlier`. A counter that is smaller now began anew: all of it was added."""
        positions = None
        if self.accepted_at is not None and earlier.accepted_at is not None:
            before = earlier.accepted_at + (0.0,) * (len(self.accepted_at) - len(earlier.accepted_at))
            positions = tuple(_added(now, then) or 0.0 for now, then in zip(self.accepted_at, before, strict=False))
        return Counts(
            **{name: _added(getattr(self, name), getattr(earlier, name)) for name in COUNTERS}, accepted_at=positions
        )


@dataclass(frozen=True)
class Reading:
    """One answer of /metrics; `at_s` is when it was read, by time.time()."""

    at_s: float
    model: str | None = None
    started_s: Value = None
    running: Value = None  # requests
    waiting: Value = None
    kv_usage: Value = None  # share of the KV cache, 0 to 1
    counts: Counts = field(default_factory=Counts)

    @property
    def uptime_s(self) -> Value:
        return None if self.started_s is None else max(self.at_s - self.started_s, 0.0)

    def tokens_per_s(self, earlier: Reading) -> Value:
        """Generated tokens a second since an earlier reading; None where either does not count them."""
        elapsed_s = self.at_s - earlier.at_s
        return _over(self.counts.since(earlier.counts).generated, elapsed_s if elapsed_s > 0 else None)

    def restarted(self, earlier: Reading) -> bool:
        """Whether another process answered before."""
        return self.started_s != earlier.started_s


# A field and the names that vLLM has for it, newest first, without the counters' _total.
COUNTERS = {
    "prompted": ("vllm:prompt_tokens",),
    "generated": ("vllm:generation_tokens",),
    "drafts": ("vllm:spec_decode_num_drafts",),
    "draft_tokens": ("vllm:spec_decode_num_draft_tokens",),
    "accepted": ("vllm:spec_decode_num_accepted_tokens",),
}
ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos"
# And how the values of several engines in one server become one.
GAUGES: dict[str, tuple[tuple[str, ...], Callable[[Iterable[float]], float]]] = {
    "running": (("vllm:num_requests_running",), sum),
    "waiting": (("vllm:num_requests_waiting",), sum),
    "kv_usage": (("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"), max),
    "started_s": (("process_start_time_seconds",), min),
}


def read(text: str, at_s: float) -> Reading:
    """The values in an answer of /metrics, read at `at_s`. Raises UserError for what is not Prometheus' format."""
    found: dict[str, list[float]] = {}
    positions: dict[int, float] = {}
    model = None
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name.removesuffix("_total")
                found.setdefault(name, []).append(sample.value)
                if name.startswith("vllm:"):
                    model = model or sample.labels.get("model_name")
                if name == ACCEPTED_AT:
                    position = int(sample.labels["position"])
                    positions[position] = positions.get(position, 0.0) + sample.value
    except (ValueError, KeyError) as error:
        raise UserError(
            f"/metrics is not in Prometheus' text format: {str(error)[:80]!r}", "make serve-logs: is vLLM behind it?"
        ) from None
    return Reading(
        at_s,
        model,
        counts=Counts(
            **{name: _first(found, names, sum) for name, names in COUNTERS.items()},
            accepted_at=tuple(positions[i] for i in sorted(positions)) if positions else None,
        ),
        **{name: _first(found, names, joined) for name, (names, joined) in GAUGES.items()},
    )


def total(counts: Iterable[Counts]) -> Counts:
    """The sum over replicas of what each counts; None where none counts it."""
    every = list(counts)
    positions = [each.accepted_at for each in every if each.accepted_at is not None]
    depth = max(map(len, positions), default=0)
    return Counts(
        **{name: _sum(getattr(each, name) for each in every) for name in COUNTERS},
        accepted_at=tuple(sum(at[i] for at in positions if i < len(at)) for i in range(depth)) if positions else None,
    )


def _first(found: dict[str, list[float]], names: Iterable[str], joined: Callable[[Iterable[float]], float]) -> Value:
    return next((joined(found[name]) for name in names if name in found), None)


def _sum(values: Iterable[Value]) -> Value:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _added(now: Value, then: Value) -> Value:
    if now is None or then is None:
        return None
    return now - then if now >= then else now


def _over(value: Value, divisor: Value) -> Value:
    return value / divisor if value is not None and divisor else None
