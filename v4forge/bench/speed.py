"""How fast a server answers, with drafts and without: the points that are measured, the figures of one, and what drafts
gain against none.

Two figures are compared, because drafts may raise one and lower the other. The TPOT speed-up is what one reader sees:
the median time per output token without drafts over that with them. The throughput ratio is what the machine does:
output tokens a second with drafts over those without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from v4forge.bench.statistics import drawn, ends, resampled
from v4forge.errors import UserError
from v4forge.intervals import Estimate

DRAWS = 10_000
# Chunks of a stream that come this close together came in one piece: something between holds answers back.
BURST_S = 1e-4
# A server may put a token or two of its own before a prompt.
OWN_TOKENS = 2
YES, NO, UNCLEAR = "yes", "no", "unclear"

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Point:
    """Requests of `input_tokens`, answers of `output_tokens`, `drafts` a step; `concurrency` at a time, or, where that
    is None, `request_rate` of them a second, no matter when earlier ones end. `again`: a server's first point once
    more, in the end, which tells how far it drifted meanwhile."""

    drafts: int
    input_tokens: int
    output_tokens: int
    concurrency: int | None
    again: bool = False
    request_rate: float | None = None

    @property
    def shape(self) -> str:
        return f"{self.input_tokens}x{self.output_tokens}"

    @property
    def key(self) -> str:
        load = f"c{self.concurrency}" if self.request_rate is None else f"r{self.request_rate:g}"
        return f"k{self.drafts}/{self.shape}/{load}" + "/again" * self.again


def points(
    drafts: int, shapes: Sequence[tuple[int, int]], concurrencies: Sequence[int], rates: Sequence[float] = ()
) -> list[Point]:
    """What is measured on one server, in this order."""
    every = [Point(drafts, *shape, concurrency) for shape in shapes for concurrency in concurrencies]
    first = every[0]
    every += [Point(drafts, *shape, None, request_rate=rate) for shape in shapes for rate in rates]
    return [*every, Point(drafts, first.input_tokens, first.output_tokens, first.concurrency, again=True)]


def figures(result: Json, point: Point, requests: int, slo_ms: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a point, from the detailed result of `vllm bench serve` over `requests` requests.

    Times are of the requests, in ms. TPOT is (whole time - TTFT) / (output tokens - 1), by request: a step with drafts
    sends several tokens at once, so the gaps between chunks, ITL, are no times per token. `bursts` is the share of
    those gaps that are none. Raises UserError unless every request was answered in full.
    """
    try:
        _check_whole(result, point, requests)
        ttft, whole, lengths = (np.array(result[name], np.float64) for name in ("ttfts", "latencies", "output_lens"))
        gaps = np.array([gap for each in result["itls"] for gap in each], np.float64)
        duration_s = float(result["duration"])
        read = [int(length) for length in result["input_lens"]]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        fact = f"the result of vllm bench serve has another form: {type(error).__name__} {error}"
        raise UserError(fact, "make env-serve-cpu, or make images IMAGE=serve: the pinned version") from None
    tpot = (whole - ttft) / (lengths - 1)
    good = (ttft * 1e3 <= slo_ms["ttft"]) & (tpot * 1e3 <= slo_ms["tpot"])
    return {
        "drafts": point.drafts,
        "input_tokens": point.input_tokens,
        "output_tokens": point.output_tokens,
        "concurrency": point.concurrency,
        "request_rate": point.request_rate,
        "again": point.again,
        "requests": requests,
        "completed": int(result["completed"]),
        "failed": int(result["failed"]),
        "prompt_tokens": [min(read), max(read)],
        "duration_s": duration_s,
        "ttft_ms": _distribution(ttft * 1e3),
        "tpot_ms": _distribution(tpot * 1e3),
        "e2el_ms": _distribution(whole * 1e3),
        "itl_ms": _distribution(gaps * 1e3) if len(gaps) else None,
        "output_tok_s": float(lengths.sum()) / duration_s,
        "request_s": requests / duration_s,
        "goodput_request_s": int(good.sum()) / duration_s,
        "slo": {"ttft_ms": slo_ms["ttft"], "tpot_ms": slo_ms["tpot"]},
        "bursts": float((gaps < BURST_S).mean()) if len(gaps) else None,
        "samples": {
            name: [round(float(value) * 1e3, 4) for value in values]
            for name, values in (("ttft_ms", ttft), ("tpot_ms", tpot), ("e2el_ms", whole))
        },
    }


def _check_whole(result: Json, point: Point, requests: int) -> None:
    errors = [text for error in result["errors"] if (text := str(error or "").strip())]
    if result["failed"] or result["completed"] != requests:
        failed = requests - int(result["completed"])
        first = errors[0].splitlines()[-1] if errors else "without an error"
        raise UserError(f"{failed} of {requests} requests failed, the first with: {first[:200]}", "make serve-logs")
    if short := [length for length in result["output_lens"] if length != point.output_tokens]:
        fact = f"{len(short)} of {requests} answers have not {point.output_tokens} tokens, the first has {short[0]}"
        raise UserError(fact, "make serve-logs: did the server break off, or does it not know ignore_eos?")
    if other := [read for read in result["input_lens"] if abs(read - point.input_tokens) > OWN_TOKENS]:
        fact = f"the server read {other[0]} tokens in a prompt of {point.input_tokens}"
        raise UserError(fact, "its tokenizer is another one: --artifact <folder of what is served>")


def _distribution(values: np.ndarray) -> dict[str, Any]:
    return {
        "median": float(np.median(values)),
        "p99": float(np.percentile(values, 99)),
        "mean": float(values.mean()),
        "quartiles": [float(value) for value in np.percentile(values, [25, 75])],
    }


@dataclass(frozen=True)
class Comparison:
    """What `drafts` gain at a point against none. `tpot_speedup` and `throughput_ratio` are above 1 where they gain;
    the drifts are the largest change of either server between its first point and that point again, as the factor by
    which the larger figure exceeds the smaller, less 1; None where that was not measured."""

    drafts: int
    shape: str
    concurrency: int
    tpot_speedup: Estimate
    throughput_ratio: Estimate
    tpot_drift: float | None
    throughput_drift: float | None

    @property
    def pays(self) -> str:
        """Whether the throughput ratio is above 1 beyond noise: "yes", "no" where it is below 1 beyond noise, else
        "unclear". Noise is the interval, widened by the drift. What a single reader gains is another question, which
        faster answers."""
        return _beyond(self.throughput_ratio, self.throughput_drift)

    @property
    def faster(self) -> str:
        """Whether a token takes less time beyond noise, in the same way."""
        return _beyond(self.tpot_speedup, self.tpot_drift)

    def json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "tpot_speedup": self.tpot_speedup.json(),
            "throughput_ratio": self.throughput_ratio.json(),
            "pays": self.pays,
            "faster": self.faster,
        }


def _beyond(ratio: Estimate, drift: float | None) -> str:
    if math.isnan(ratio.low):
        return UNCLEAR
    noise = 1 + (drift or 0.0)
    return YES if ratio.low / noise > 1 else NO if ratio.high * noise < 1 else UNCLEAR


def is_open(part: Json) -> bool:
    """Whether requests came at a rate, an open loop, instead of so many at a time. Older files know of none."""
    return part.get("request_rate") is not None


def in_flight(part: Json) -> int:
    """Requests that ran together: the concurrency; of an open loop the mean, by Little's law, at least 1."""
    if not is_open(part):
        return int(part["concurrency"])
    return max(1, round(sum(part["samples"]["e2el_ms"]) / 1e3 / part["duration_s"]))


def place(part: Json) -> tuple[float, ...]:
    """By which points are shown: shape, concurrency, then rates, k."""
    load = (math.inf, part["request_rate"]) if is_open(part) else (part["concurrency"], 0)
    return part["input_tokens"], part["output_tokens"], *load, part["drafts"]


def compare(parts: Mapping[str, Json], seed: int) -> list[Comparison]:
    """Every measured point with drafts against the same one without, by drafts, shape and concurrency; none at a rate,
    where throughput is what was asked for."""
    found = []
    ordered = sorted(
        (part for part in parts.values() if not is_open(part)),
        key=lambda part: [part[name] for name in ("drafts", *_PLACE)],
    )
    for part in ordered:
        without = parts.get(Point(0, *(part[name] for name in _PLACE)).key)
        if not part["drafts"] or part["again"] or without is None:
            continue
        drifts = [drift for each in (part, without) if (drift := drift_of(parts, each["drafts"]))]
        tpot, throughput = _ratios(part, without, seed)
        found.append(
            Comparison(
                part["drafts"],
                f"{part['input_tokens']}x{part['output_tokens']}",
                part["concurrency"],
                tpot,
                throughput,
                max((excess(drift["tpot"]) for drift in drifts), default=None),
                max((excess(drift["throughput"]) for drift in drifts), default=None),
            )
        )
    return found


def excess(change: float) -> float:
    """By how much the larger of two figures exceeds the smaller: a third less is as far as a half more."""
    return max(1 + change, 1 / (1 + change)) - 1


_PLACE = ("input_tokens", "output_tokens", "concurrency")


def drift_of(parts: Mapping[str, Json], drafts: int) -> dict[str, float] | None:
    """The relative change of a server's first point when it was measured again in the end: of its median TPOT and its
    throughput. None where either was not measured."""
    for key, last in parts.items():
        first = parts.get(key.removesuffix("/again"))
        if last["again"] and last["drafts"] == drafts and first is not None:
            return {
                "tpot": last["tpot_ms"]["median"] / first["tpot_ms"]["median"] - 1,
                "throughput": last["output_tok_s"] / first["output_tok_s"] - 1,
            }
    return None


def _ratios(part: Json, without: Json, seed: int) -> tuple[Estimate, Estimate]:
    """TPOT speed-up and throughput ratio with 95% intervals, by a bootstrap over requests.

    Prompts are the same with drafts and without, and so are the groups of requests that are drawn, of eight or more at
    every concurrency. Throughput is (requests in flight) x (output tokens) / (time of a request), Little's law, with
    the mean number in flight as measured. How far one start of a server differs from another is not in it.
    """
    speedup = without["tpot_ms"]["median"] / part["tpot_ms"]["median"]
    ratio = part["output_tok_s"] / without["output_tok_s"]
    count = part["requests"] // part["concurrency"]
    if count < 2 or part["requests"] != without["requests"]:
        return Estimate(speedup, math.nan, math.nan), Estimate(ratio, math.nan, math.nan)
    (groups,) = drawn([count], DRAWS, seed)
    tpot, whole = (
        [resampled(each["samples"][name], part["concurrency"], groups) for each in (part, without)]
        for name in ("tpot_ms", "e2el_ms")
    )
    in_flight = [sum(each["samples"]["e2el_ms"]) / each["duration_s"] for each in (part, without)]
    speedups = np.median(tpot[1], axis=1) / np.median(tpot[0], axis=1)
    ratios = in_flight[0] / in_flight[1] * whole[1].mean(axis=1) / whole[0].mean(axis=1)
    return Estimate(speedup, *ends(speedups, count)), Estimate(ratio, *ends(ratios, count))


@dataclass(frozen=True)
class Stop:
    """Where `drafts` stop paying for requests of a shape: `at` is the lowest measured concurrency from which on the
    throughput is nowhere above that without drafts beyond noise, None where it still is at the highest."""

    drafts: int
    shape: str
    pays: list[int]
    at: int | None
    measured: list[int]
    there: Estimate | None

    def sentence(self) -> str:
        who = f"k={self.drafts}, {self.shape}:"
        if self.at is None or self.there is None:
            most = f"{who} pays up to concurrency {self.measured[-1]}, the most that was measured"
            without = [each for each in self.measured if each not in self.pays]
            return f"{most}; at {listed(without)} it does not" if without else most
        how = f"{self.there.value:.2f} x the throughput"
        if not math.isnan(self.there.low):
            how += f", {self.there.low:.2f} to {self.there.high:.2f}"
        if self.there.value > 1:
            how += ": no gain beyond noise"
        if not self.pays:
            most = (
                f"none of {listed(self.measured)}"
                if len(self.measured) > 1
                else f"no concurrency, {self.at} was measured"
            )
            return f"{who} pays at {most} ({how} at {self.at})"
        return f"{who} pays at concurrency {listed(self.pays)}, stops paying at {self.at} ({how})"


def stops(comparisons: Iterable[Comparison]) -> list[Stop]:
    """Where each number of drafts stops paying, by shape."""
    groups: dict[tuple[int, str], list[Comparison]] = {}
    for each in comparisons:
        groups.setdefault((each.drafts, each.shape), []).append(each)
    found = []
    for (drafts, shape), group in groups.items():
        group.sort(key=lambda each: each.concurrency)
        pays = [each.concurrency for each in group if each.pays == YES]
        beyond = [each for each in group if each.concurrency > max(pays, default=0)]
        at, there = (beyond[0].concurrency, beyond[0].throughput_ratio) if beyond else (None, None)
        found.append(Stop(drafts, shape, pays, at, [each.concurrency for each in group], there))
    return found


def summary(parts: Mapping[str, Json], seed: int) -> dict[str, Any]:
    """What the parts of a measurement say together, for its file: drifts by drafts, comparisons, where drafts stop."""
    compared = compare(parts, seed)
    measured = sorted({part["drafts"] for part in parts.values()})
    return {
        "drift": {str(drafts): drift_of(parts, drafts) for drafts in measured},
        "comparisons": [each.json() for each in compared],
        "stops_paying": [
            {**vars(stop), "there": stop.there.json() if stop.there else None, "sentence": stop.sentence()}
            for stop in stops(compared)
        ],
    }


def listed(numbers: Sequence[int]) -> str:
    """1, 4 and 16."""
    words = [str(number) for number in numbers]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
