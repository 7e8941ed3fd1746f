"""The points of a speed bench: what a result file says of each, and of all together.

Pure functions of a result file's content (bench/results.py). A key that it lacks is a KeyError; the caller knows
the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from v4forge.bench.speed import Comparison, compare, drift_of, is_open, stops
from v4forge.bench.terms import acceptance_length
from v4forge.reporting.tables import Json

# One replica of two GPUs is what was measured there.
PUBLISHED_REPLICA = {"replicas": 1, "tensor_parallel": 2}


@dataclass(frozen=True)
class SpeedRow:
    """One point: k drafts, one shape, one concurrency, or a rate of requests. `gain` is against k=0 at the same, None
    without that."""

    drafts: int
    shape: str  # <input>x<output> tokens
    concurrency: int | None  # None at a rate
    ttft_ms: tuple[float, float]  # median, p99
    tpot_ms: tuple[float, float]
    itl_ms: tuple[float, float] | None  # None in files of before
    quartiles_ms: tuple[float, float] | None
    output_tok_s: float
    goodput_request_s: float | None
    slo: Json
    acceptance: float | None
    gain: Comparison | None = None
    request_rate: float | None = None  # requests a second, an open loop

    @property
    def load(self) -> str:
        """The concurrency, or the rate."""
        return f"concurrency {self.concurrency}" if self.request_rate is None else f"{self.request_rate:g} req/s"

    @property
    def key(self) -> str:
        """As in the result file."""
        load = f"c{self.concurrency}" if self.request_rate is None else f"r{self.request_rate:g}"
        return f"k{self.drafts}/{self.shape}/{load}"

    @property
    def user_tok_s(self) -> float:
        """Tokens a second that one user sees after the first: of the median TPOT."""
        return 1e3 / self.tpot_ms[0]

    @property
    def acceptance_length(self) -> float | None:
        """A server that drafts always proposes k tokens a step."""
        return None if self.acceptance is None else acceptance_length(self.drafts * self.acceptance, 1)


@dataclass(frozen=True)
class Speed:
    """What a result file says: its points, by shape, concurrency, rate and k. They ran on `gpus` of the machine's
    `machine_gpus`; None where nobody told, or on a CPU."""

    points: list[SpeedRow]
    drift: str  # how far the servers changed by themselves; '' where no point was measured again
    stops: list[str]  # for each shape and k a sentence: at which concurrency speculation stops paying
    conditions: str  # the deployment, where it is another than the published one
    gpus: int | None = None
    machine_gpus: int | None = None

    @property
    def closed(self) -> list[SpeedRow]:
        """The points with a concurrency."""
        return [row for row in self.points if row.concurrency is not None]


def rows(result: Json) -> Speed:
    """Without the points that were measured again to see how far a server drifted."""
    gains = compare(result["parts"], int(result.get("seed") or 0))
    by_point = {(gain.drafts, gain.shape, gain.concurrency): gain for gain in gains}
    points = [_row(part, by_point) for part in result["parts"].values() if not part.get("again")]
    return Speed(
        sorted(points, key=_place),
        drift=_drift(result["parts"]),
        stops=_stops_paying(gains, points),
        conditions=_conditions(result["target"]),
        **_gpus(result),
    )


def _place(row: SpeedRow) -> tuple[float, ...]:
    load = (math.inf, row.request_rate or 0) if row.concurrency is None else (row.concurrency, 0)
    return *map(int, row.shape.split("x")), *load, row.drafts


def _gpus(result: Json) -> dict[str, int | None]:
    """GPUs that served, and that the machine has."""
    target, there = result["target"], result["machine"].get("gpus") or []
    if target.get("backend") == "cpu" or not there or not target.get("replicas"):
        return {"gpus": None, "machine_gpus": None}
    used = int(target["replicas"]) * int(target.get("tensor_parallel") or 1)
    return {"gpus": used, "machine_gpus": max(used, len(there))}


def _row(part: Json, gains: Mapping[tuple[int, str, int], Comparison]) -> SpeedRow:
    tpot, quartiles = part["tpot_ms"], part["tpot_ms"].get("quartiles")
    drafts, at_rate = int(part["drafts"]), is_open(part)
    concurrency = None if at_rate else int(part["concurrency"])
    shape = f"{int(part['input_tokens'])}x{int(part['output_tokens'])}"
    return SpeedRow(
        drafts=drafts,
        shape=shape,
        concurrency=concurrency,
        ttft_ms=(float(part["ttft_ms"]["median"]), float(part["ttft_ms"]["p99"])),
        tpot_ms=(float(tpot["median"]), float(tpot["p99"])),
        itl_ms=(float(itl["median"]), float(itl["p99"])) if (itl := part.get("itl_ms")) else None,
        quartiles_ms=(float(quartiles[0]), float(quartiles[1])) if quartiles else None,
        output_tok_s=float(part["output_tok_s"]),
        goodput_request_s=None if part["goodput_request_s"] is None else float(part["goodput_request_s"]),
        slo=part.get("slo") or {},
        acceptance=None if part.get("acceptance") is None else float(part["acceptance"]),
        gain=None if concurrency is None else gains.get((drafts, shape, concurrency)),
        request_rate=float(part["request_rate"]) if at_rate else None,
    )


def _drift(parts: Mapping[str, Json]) -> str:
    drafts = sorted({int(part["drafts"]) for part in parts.values()})
    found = [each for k in drafts if (each := drift_of(parts, k))]
    if not found:
        return ""
    time, tokens = (100 * max(abs(each[name]) for each in found) for name in ("tpot", "throughput"))
    again = "A server's first point, measured again in the end, differed by at most"
    return f"{again} {time:.1f}% in TPOT, {tokens:.1f}% in output throughput."


def _stops_paying(gains: Sequence[Comparison], points: Sequence[SpeedRow]) -> list[str]:
    said = [stop.sentence() for stop in stops(gains)]
    compared = {(row.shape, row.drafts) for row in points if row.gain}
    for shape, k in sorted({(row.shape, row.drafts) for row in points if row.drafts} - compared):
        said.append(f"k={k}, {shape}: not known where it stops paying, k=0 was not measured")
    return said


def _conditions(target: Json) -> str:
    deployed = {name: target.get(name) for name in PUBLISHED_REPLICA}
    if deployed == PUBLISHED_REPLICA:
        return ""
    return f"other conditions: {deployed['replicas'] or '?'} replicas of TP={deployed['tensor_parallel'] or '?'}"
