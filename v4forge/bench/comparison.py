"""Two runs of the benches: what differs in figures, by how much, and whether noise explains it.

A difference is B minus A with a 95% interval and a two-sided p. What is called beyond noise is so with all differences
of a comparison at once, by Holm's procedure (1979, Scandinavian Journal of Statistics 6:65): where nothing differs, one
in twenty comparisons names anything at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from v4forge.bench.results import Result
from v4forge.bench.speed import drift_of, excess, in_flight
from v4forge.bench.standing import worth_of
from v4forge.bench.statistics import drawn, holm, resampled, standard_error, two_sided, z_test
from v4forge.bench.workloads import TITLES
from v4forge.errors import UserError
from v4forge.intervals import NORMAL, Figure, quantile, ratio

DRAWS = 4000
SEED = 0  # of the bootstrap: the same files give the same figures
# What a run was asked, and what it was asked of. Where these differ is said; `url` is only a place.
SIDES = ("trial", "complete", "target", "machine", "versions", "settings", "sampling", "seed", "hashes")
PLACES = ("target.url",)

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Delta:
    """One figure of both runs. change: B - A, in percent of A where `relative`, else in `unit`; None: no comparison."""

    metric: str
    a: float
    b: float
    unit: str
    higher_is_better: bool
    change: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    relative: bool = False
    drift: float = 0.0  # percent by which a server changed by itself meanwhile
    note: str = ""
    beyond_noise: bool = False

    @property
    def better(self) -> bool:
        """Whether B is the better one; of a difference beyond noise."""
        return (self.b > self.a) == self.higher_is_better


@dataclass(frozen=True)
class Comparison:
    """Two result files of one bench. settings: (what, A's, B's) where they differ; warnings: why to be careful."""

    bench: str
    a: str
    b: str
    deltas: list[Delta]
    settings: list[tuple[str, str, str]]
    warnings: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        deltas = [asdict(each) | ({"better": each.better} if each.beyond_noise else {}) for each in self.deltas]
        return asdict(self) | {"deltas": deltas}


def compare(a: Mapping[str, Result], b: Mapping[str, Result]) -> list[Comparison]:
    """Every bench that both runs have. Raises UserError where there is none, or a bench has no part in both."""
    shared = [bench for bench in a if bench in b]
    if not shared:
        fact = f"A has {', '.join(a) or 'no bench'}, B has {', '.join(b) or 'no bench'}: nothing to compare"
        raise UserError(fact, "pass two runs of the same bench: make compare A=<folder or file> B=<folder or file>")
    found = [_compared(a[bench], b[bench]) for bench in shared]
    tested = [delta.p for each in found for delta in each.deltas if delta.p is not None]
    limit = holm(tested)
    return [replace(each, deltas=[_judged(delta, limit) for delta in each.deltas]) for each in found]


def _judged(delta: Delta, limit: float) -> Delta:
    beyond = delta.p is not None and delta.p <= limit and abs(delta.change or 0.0) > delta.drift
    return replace(delta, beyond_noise=beyond)


def verdict(compared: Sequence[Comparison], a: str = "A", b: str = "B") -> str:
    """All of it in one line: whether b is better or worse than a beyond noise, in how many figures of which benches.

    a, b: what the runs are called.
    """
    tested = sum(delta.p is not None for each in compared for delta in each.deltas)
    if not tested:
        return f"not known: no figure of {a} and {b} can be tested"
    found = []
    for better, word in ((True, "better"), (False, "worse")):
        counts = {
            each.bench: sum(delta.beyond_noise and delta.better == better for delta in each.deltas) for each in compared
        }
        if total := sum(counts.values()):
            where = ", ".join(f"{bench} {count}" for bench, count in counts.items() if count)
            found.append(f"{word} in {total} ({where})")
    careful = sum(len(each.warnings) for each in compared)
    care = f"; with {careful} warning{'s' * (careful > 1)}" if careful else ""
    if not found:
        return f"no difference between {a} and {b} beyond noise, in {tested} tested figures{care}"
    return f"of {tested} tested figures {b} is beyond noise {' and '.join(found)}{care}"


def _compared(a: Result, b: Result) -> Comparison:
    keys = [key for key in a.content["parts"] if key in b.content["parts"]]
    if not keys:
        fact = f"{a.path} and {b.path} have no part in common"
        raise UserError(fact, f"run both with the same options: make bench-{a.bench}")
    settings = [each for each in differences(a.content, b.content) if each[0] not in PLACES]
    reader = READERS[a.bench]
    other, reasons = _other_questions(a.content, b.content, keys)
    deltas = list(reader(a.content, b.content, [key for key in keys if key not in other]))
    for each in reader(a.content, b.content, other):
        deltas.append(replace(each, change=None, low=None, high=None, p=None, note="not comparable"))
    warnings = [f"not comparable: {reason}" for reason in reasons]
    return Comparison(a.bench, str(a.path), str(b.path), deltas, settings, [*warnings, *_warnings(a, b, len(keys))])


def _other_questions(a: Json, b: Json, keys: Sequence[str]) -> tuple[list[str], list[str]]:
    """The parts that are answers to other questions, and why.

    A hash is that of one part's prompts where it is named as the part is, with or without its number of drafts.
    """
    differ = [name for name in a["hashes"] if name in b["hashes"] and a["hashes"][name] != b["hashes"][name]]
    of_parts = {
        name: [key for key in keys if f"/{key}".endswith(f"/{name.removeprefix('prompts/')}")] for name in differ
    }
    asked = differences({"sampling": a["sampling"]}, {"sampling": b["sampling"]})
    reasons = [f"{name} differ" for name in differ] + [f"{what} is {one} and {other}" for what, one, other in asked]
    if asked or not all(of_parts.values()):
        return list(keys), reasons
    return [key for key in keys if any(key in named for named in of_parts.values())], reasons


def _warnings(a: Result, b: Result, shared: int) -> Iterator[str]:
    for name, each in (("A", a), ("B", b)):
        worth = worth_of(each.content)
        for mark in worth.marks:
            yield f"{name}: {mark}"
        if not worth.complete:
            yield f"{name} is unfinished"
        if more := len(each.content["parts"]) - shared:
            yield f"{name} has {more} parts that the other has not"
    if a.bench == "speed" and a.content["machine"] != b.content["machine"]:
        yield "other machines: the difference is theirs as much as the artifact's"
    if a.bench == "speed":
        yield "noise is that between requests of one run; another start of a server may differ by more"


def differences(a: Json, b: Json) -> list[tuple[str, str, str]]:
    """(what, A's, B's) of everything that was asked, and of what, where it differs."""
    one, other = ({key: each.get(key) for key in SIDES} for each in (a, b))
    left, right = dict(_leaves(one, "")), dict(_leaves(other, ""))
    names = [*left, *(name for name in right if name not in left)]
    pairs = [(name, left.get(name, "none"), right.get(name, "none")) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, "none" if value is None else str(value)


# Speed: name, where it is in a part, unit, whether higher is better.
SPEEDS = (
    ("TPOT, ms", "tpot_ms", "ms", False),
    ("TTFT, ms", "ttft_ms", "ms", False),
    ("output tok/s", "output_tok_s", "tok/s", True),
)


def _speed(a: Json, b: Json, keys: Sequence[str]) -> Iterator[Delta]:
    paired = a["hashes"] == b["hashes"]
    for key in (key for key in keys if not a["parts"][key].get("again")):
        one, other = a["parts"][key], b["parts"][key]
        drifts = [drift for each in (a, b) if (drift := drift_of(each["parts"], one["drafts"]))]
        for name, metric, unit, higher in SPEEDS:
            change, error, freedom = _log_change(one, other, metric, paired)
            margin = quantile(freedom) * error
            low, high = (None if math.isnan(margin) else 100 * math.expm1(change + side * margin) for side in (-1, 1))
            drifted = max((excess(each["throughput" if higher else "tpot"]) for each in drifts), default=0.0)
            yield Delta(
                metric=f"{key}: {name}",
                a=_value(one, metric),
                b=_value(other, metric),
                unit=unit,
                higher_is_better=higher,
                change=100 * math.expm1(change),
                low=low,
                high=high,
                p=two_sided(change, error, freedom),
                relative=True,
                drift=100 * drifted,
            )


def _value(part: Json, metric: str) -> float:
    """A figure, or the median of one."""
    return float(part[metric]["median"] if isinstance(part[metric], Mapping) else part[metric])


def _log_change(a: Json, b: Json, metric: str, paired: bool) -> tuple[float, float, int]:
    """log(B / A), its standard error by a bootstrap, and the degrees of freedom; NaN where there are too few requests.

    Where the prompts are the same, so are the groups of requests that are drawn. Throughput moves with the mean time
    of a request (Little's law), whose error it has.
    """
    name = "e2el_ms" if metric == "output_tok_s" else metric
    counts = [int(each["requests"]) // in_flight(each) for each in (a, b)]
    change = math.log(_value(b, metric) / _value(a, metric))
    if min(counts) < 2:
        return change, math.nan, 0
    groups = drawn(counts, DRAWS, SEED)
    if paired and counts[0] == counts[1]:
        groups[1] = groups[0]
    logs = []
    for each, numbers in zip((a, b), groups, strict=True):
        picked = resampled(each["samples"][name], in_flight(each), numbers)
        logs.append(np.log(picked.mean(axis=1) if name == "e2el_ms" else np.median(picked, axis=1)))
    few = min(counts)
    return change, standard_error(logs[1] - logs[0], few), few - 1


def _draft(a: Json, b: Json, keys: Sequence[str]) -> Iterator[Delta]:
    for key in keys:
        one, other = a["parts"][key], b["parts"][key]
        title = TITLES.get(key, key)
        paired = a["hashes"] == b["hashes"] and len(one["counted"]) == len(other["counted"])
        figures = [_acceptances(each) for each in (one, other)]
        for name in (name for name in figures[0] if name in figures[1]):
            yield _shares(f"{title}: {name}", figures[0][name], figures[1][name], paired)


def _acceptances(part: Json) -> dict[str, Figure]:
    """The acceptance rate of all proposed, and at each position of those whose earlier ones were, over prompts."""
    table = np.array(part["counted"], np.float64).T
    drafts, accepted = table[0], table[1:]
    proposed = np.array(part["proposed"], np.float64) if "proposed" in part else drafts * len(accepted)
    found = {"acceptance rate": ratio(accepted.sum(0), proposed)}
    for number, at in enumerate(accepted):
        found[f"position {number + 1}" + (f" after {number}" if number else "")] = ratio(at, table[number])
    return found


def _shares(metric: str, a: Figure, b: Figure, paired: bool) -> Delta:
    if paired:
        apart = Figure(b.value - a.value, b.influence - a.influence)
        error = apart.standard_error
    else:
        error = math.hypot(a.standard_error, b.standard_error)
    return _points(metric, 100 * a.value, 100 * b.value, 100 * error, min(len(a.influence), len(b.influence)) - 1, "%")


def _points(metric: str, a: float, b: float, error: float, freedom: int, unit: str) -> Delta:
    change, margin = b - a, quantile(freedom) * error
    low, high = (None if math.isnan(margin) else change + side * margin for side in (-1, 1))
    return Delta(metric, a, b, unit, True, change, low, high, two_sided(change, error, freedom))


def _quality(a: Json, b: Json, keys: Sequence[str]) -> Iterator[Delta]:
    for key in keys:
        one, other = a["parts"][key], b["parts"][key]
        for name in (name for name in one["metrics"] if name in other["metrics"]):
            values = [_percent(each["metrics"][name]) for each in (one, other)]
            old, new = (float(value["value"] or 0.0) for value in values)
            if one.get("task_hash") != other.get("task_hash"):
                yield Delta(f"{key}: {name}", old, new, "%", True, None, note="not comparable: other prompts")
                continue
            found = z_test(values[1], values[0])
            margin = math.nan if found["se"] is None else NORMAL * found["se"]
            low, high = (None if math.isnan(margin) else new - old + side * margin for side in (-1, 1))
            yield Delta(f"{key}: {name}", old, new, "%", True, found["delta"], low, high, found["p"])


def _percent(metric: Json) -> dict[str, float | None]:
    return {name: None if value is None else 100 * value for name, value in metric.items()}


def _tools(a: Json, b: Json, keys: Sequence[str]) -> Iterator[Delta]:
    """Sums over scenarios, and how far those differ tells the noise of a sum of others like them."""
    calls = [key for key in keys if not key.startswith("smoke/")]
    smoke = [key for key in keys if key.startswith("smoke/")]
    points = {key: (a["parts"][key]["score"], b["parts"][key]["score"]) for key in calls}
    passed = {key: (int(a["parts"][key]["ok"]), int(b["parts"][key]["ok"])) for key in smoke}
    for title, unit, pairs in (("tool calls", "points", points), ("conversations", "passed", passed)):
        if pairs:
            apart = np.array([other - one for one, other in pairs.values()], np.float64)
            n = len(apart)
            error = math.sqrt(n) * float(apart.std(ddof=1)) if n > 1 else math.nan
            old, new = (float(sum(pair[side] for pair in pairs.values())) for side in (0, 1))
            yield replace(
                _points(f"{title}, {n} of them", old, new, error, n - 1, unit),
                note=", ".join(key for key, (one, other) in pairs.items() if one != other),
            )


# What compares two result files of a bench, in the parts with these keys.
READERS: dict[str, Callable[[Json, Json, Sequence[str]], Iterator[Delta]]] = {
    "speed": _speed,
    "draft": _draft,
    "quality": _quality,
    "tools": _tools,
}
