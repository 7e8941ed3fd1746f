"""The speed bench in the report: how fast at which concurrency, and what drafts gain.

Pure functions of a result file's content (bench/results.py). A key that it lacks is a KeyError; the caller knows
the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from v4forge.bench.published_figures import by_key
from v4forge.bench.speed import NO, YES, Comparison, compare, drift_of, stops
from v4forge.bench.standing import Worth
from v4forge.bench.terms import acceptance_length
from v4forge.intervals import Estimate
from v4forge.reporting import svg
from v4forge.reporting.svg import Drawn
from v4forge.reporting.tables import (
    NONE,
    NOT_MEASURED,
    NOTHING,
    Cell,
    Drawing,
    Found,
    Json,
    Table,
    columns,
    ends,
    number,
)

TITLE = "Speed by concurrency"
SAID = "Where drafts stop paying, by output throughput"
# One replica of two GPUs is what was measured there.
PUBLISHED_REPLICA = {"replicas": 1, "tensor_parallel": 2}


@dataclass(frozen=True)
class SpeedRow:
    """One point: k drafts, one shape, one concurrency. `gain` is against k=0 at the same, None without that."""

    drafts: int
    shape: str  # <input>x<output> tokens
    concurrency: int
    ttft_ms: tuple[float, float]  # median, p99
    tpot_ms: tuple[float, float]
    itl_ms: tuple[float, float] | None  # None in files of before
    quartiles_ms: tuple[float, float] | None
    output_tok_s: float
    goodput_request_s: float | None
    slo: Json
    acceptance: float | None
    gain: Comparison | None = None


@dataclass(frozen=True)
class Speed:
    """What a result file says: its points, by shape, concurrency and k."""

    points: list[SpeedRow]
    drift: str  # how far the servers changed by themselves; '' where no point was measured again
    stops: list[str]  # for each shape and k a sentence: at which concurrency speculation stops paying
    conditions: str  # the deployment, where it is another than the published one


def rows(result: Json) -> Speed:
    """Without the points that were measured again to see how far a server drifted."""
    gains = compare(result["parts"], int(result.get("seed") or 0))
    by_point = {(gain.drafts, gain.shape, gain.concurrency): gain for gain in gains}
    points = [_row(part, by_point) for part in result["parts"].values() if not part.get("again")]
    return Speed(
        sorted(points, key=lambda row: (*map(int, row.shape.split("x")), row.concurrency, row.drafts)),
        drift=_drift(result["parts"]),
        stops=_stops_paying(gains, points),
        conditions=_conditions(result["target"]),
    )


def _row(part: Json, gains: Mapping[tuple[int, str, int], Comparison]) -> SpeedRow:
    tpot, quartiles = part["tpot_ms"], part["tpot_ms"].get("quartiles")
    drafts, concurrency = int(part["drafts"]), int(part["concurrency"])
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
        gain=gains.get((drafts, shape, concurrency)),
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


def tables(found: Speed, worth: Worth) -> tuple[list[Table], list[str]]:
    """All points, and where drafts stop paying."""
    lines: list[list[Cell]] = []
    without_itl = not any(row.itl_ms for row in found.points)
    for row in found.points:
        heading = Cell(row.shape.replace("x", " tokens in, ") + " out")
        if [heading] not in lines:
            lines.append([heading])
        line = [
            Cell(f"concurrency {row.concurrency}"),
            Cell(f"{row.drafts}"),
            Cell(f"{row.ttft_ms[0]:,.0f}", f"p99 {row.ttft_ms[1]:,.0f}"),
            Cell(f"{row.tpot_ms[0]:,.2f}", f"p99 {row.tpot_ms[1]:,.2f}"),
            *([] if without_itl else [_itl(row)]),
            number(row.output_tok_s, 1),
            number(row.goodput_request_s),
            _gain(row.gain.tpot_speedup, row.gain.faster) if row.gain else NONE,
            _gain(row.gain.throughput_ratio, row.gain.pays) if row.gain else NONE,
            _acceptance(row),
        ]
        lines.append(line)
    slos = [row.slo for row in found.points if row.slo]
    limits = sorted({(f"{slo['ttft_ms']:g}", f"{slo['tpot_ms']:g}") for slo in slos})
    within = " or ".join(f"{first} ms of TTFT and {each} ms of TPOT" for first, each in limits)
    note = (
        "Median and 99th percentile of requests. Gains are against k=0 at the same shape and concurrency; above "
        "1x drafts are better. Green and red are beyond noise: the 95% interval, widened by the servers' drift."
    )
    if within:
        note += f" Goodput counts requests within {within}."
    note += f" {found.drift}" if found.drift else ""
    titles = (
        "<load",
        "k",
        "TTFT, ms",
        "TPOT, ms",
        *([] if without_itl else ["ITL, ms"]),
        "output tok/s",
        "goodput, req/s",
    )
    against = ("TPOT speed-up", "throughput ratio", "acceptance rate")
    return [Table("speed", "All points", columns(*titles, *against), lines, note)], found.stops


def _gain(ratio: Estimate, beyond: str) -> Cell:
    """beyond: yes, no, or unclear, whether it is above 1 beyond noise."""
    return Cell(f"{ratio.value:.2f}x", ends(ratio, ".2f"), {YES: "good", NO: "bad"}.get(beyond, ""))


def overview(found: Speed, worth: Worth) -> Cell:
    """At the first shape: the most that one reader gains, and what drafts do to throughput at the ends."""
    if not found.points:
        return Cell("no point was measured", mark="dim")
    some = [row for row in found.points if row.shape == found.points[0].shape]
    least, most = (end(row.concurrency for row in some) for end in (min, max))
    first = [row for row in some if row.concurrency == least]
    where = f"concurrency {least}"
    gained = [row for row in first if row.gain]
    if not gained:
        row = first[0]
        return Cell(f"TPOT {row.tpot_ms[0]:,.2f} ms, {row.output_tok_s:,.1f} output tok/s", f"{where}, k={row.drafts}")
    best = max(gained, key=lambda row: row.gain.tpot_speedup.value if row.gain else 0.0)
    assert best.gain
    faster = f"{best.gain.tpot_speedup.value:.2f}x as fast as k=0"
    text = f"TPOT {best.tpot_ms[0]:,.2f} ms with k={best.drafts}, {faster}, {where}"
    said = ", ".join(_most_throughput([row for row in some if row.concurrency == at]) for at in sorted({least, most}))
    return Cell(text, f"output throughput against k=0, with the best k: {said}")


def _itl(row: SpeedRow) -> Cell:
    return Cell(f"{row.itl_ms[0]:,.2f}", f"p99 {row.itl_ms[1]:,.2f}") if row.itl_ms else NONE


def _acceptance(row: SpeedRow) -> Cell:
    """The rate, and the length below it; a server that drafts always proposes k tokens a step."""
    if row.acceptance is None:
        return NONE
    return Cell(f"{100 * row.acceptance:.1f}%", f"length {acceptance_length(row.drafts * row.acceptance, 1):.2f}")


def _most_throughput(points: Sequence[SpeedRow]) -> str:
    """Of one concurrency."""
    found = [(row.gain.throughput_ratio.value, row.drafts) for row in points if row.gain]
    return (
        "{:.2f}x (k={})".format(*max(found)) if found else NOT_MEASURED
    ) + f" at concurrency {points[0].concurrency}"


def published(found: Speed) -> dict[str, Found]:
    """Each point by the keys of what was published; under other conditions nothing is subtracted."""
    against = NOTHING if found.conditions else None
    ours = {}
    for row in found.points:
        at = f"k{row.drafts}/{row.shape}/c{row.concurrency}"
        ours[f"speed/{at}/tpot_ms"] = Found(row.tpot_ms[0], found.conditions, against=against)
        ours[f"speed/{at}/output_tok_s"] = Found(row.output_tok_s, found.conditions, against=against)
        if row.gain is not None:
            speedup = row.gain.tpot_speedup
            said = "; ".join(part for part in (ends(speedup, ".2f"), found.conditions) if part)
            ours[f"speedup/{at}/tpot_ms"] = Found(speedup.value, said, against=against)
    return ours


@dataclass(frozen=True)
class Metric:
    """A figure of points, as it is drawn."""

    name: str  # in published keys
    title: str
    unit: str
    note: str
    value: Callable[[SpeedRow], float]
    quartiles: Callable[[SpeedRow], tuple[float, float] | None] = lambda row: None


METRICS = (
    Metric(
        *("tpot_ms", "TPOT", "ms", "milliseconds, median and quartiles of the requests"),
        value=lambda row: row.tpot_ms[0],
        quartiles=lambda row: row.quartiles_ms,
    ),
    Metric(
        *("output_tok_s", "Output throughput", "tok/s", "of all requests together"),
        value=lambda row: row.output_tok_s,
    ),
)


def drawings(found: Speed, worth: Worth) -> list[Drawing]:
    """For each shape TPOT and output throughput, by concurrency, a line a k; published ones hollow."""
    drawn = []
    for shape in dict.fromkeys(row.shape for row in found.points):
        some = [row for row in found.points if row.shape == shape]
        for metric in METRICS:
            name = f"speed-{metric.name}-{shape}"
            title = f"{metric.title}, {shape.replace('x', ' in, ')} out"
            picture = _by_concurrency(name, title, metric, some, worth.published_model)
            drawn.append(Drawing(name, title, picture, metric.note))
    return drawn


def _by_concurrency(name: str, title: str, metric: Metric, points: Sequence[SpeedRow], with_published: bool) -> str:
    with svg.drawing() as drawn:
        concurrencies = sorted({row.concurrency for row in points})
        drafts = sorted({row.drafts for row in points})
        about, heights, entries, hollow = [], [0.0], [], False
        for at, k in enumerate(drafts):
            line = sorted((row for row in points if row.drafts == k), key=lambda row: row.concurrency)
            offset = 0.07 * (at - (len(drafts) - 1) / 2)
            x = [concurrencies.index(row.concurrency) + offset for row in line]
            heights += _line(drawn, metric, x, line)
            if with_published:
                originals = _originals(drawn, metric, x, line)
                heights, hollow = heights + originals, hollow or bool(originals)
            figures = ", ".join(f"{metric.value(row):,.2f} at {row.concurrency}" for row in line)
            about.append(f"k={k}: {figures}")
            entries.append((f"k={k}", svg.series(k), False))
        drawn.across(range(len(concurrencies)), [str(c) for c in concurrencies], "concurrency")
        drawn.axes.set_xlim(-0.4, len(concurrencies) - 0.6)
        drawn.upwards(svg.axis(max(heights)), lambda tick: f"{tick:,g}")
        drawn.legend([*entries, *([("published", svg.series(0), True)] if hollow else [])])
        drawn.frame(left=50, right=12, top=30, bottom=40)
        return drawn.svg(name, title, f"{metric.unit} by concurrency. " + "; ".join(about))


def _line(drawn: Drawn, metric: Metric, x: Sequence[float], points: Sequence[SpeedRow]) -> list[float]:
    """The points of one k, joined, with their quartiles; how high it all reaches."""
    y, ink = [metric.value(row) for row in points], svg.series(points[0].drafts)
    drawn.line(x, y, ink, dashed=not points[0].drafts)
    reached = list(y)
    for at, height, row in zip(x, y, points, strict=True):
        drawn.mark(at, height, ink, f"k={row.drafts}, concurrency {row.concurrency}: {height:,.2f} {metric.unit}")
        if quartiles := metric.quartiles(row):
            drawn.bar([at, at], quartiles, ink)
            reached.append(quartiles[1])
    return reached


def _originals(drawn: Drawn, metric: Metric, x: Sequence[float], points: Sequence[SpeedRow]) -> list[float]:
    """What was published of the same points, hollow."""
    found = []
    for at, row in zip(x, points, strict=True):
        figure = by_key().get(f"speed/k{row.drafts}/{row.shape}/c{row.concurrency}/{metric.name}")
        if figure and figure.original:
            found.append(figure.original.value)
            tip = f"published, k={row.drafts}, concurrency {row.concurrency}: {figure.shown(figure.original.value)}"
            drawn.mark(at, figure.original.value, svg.series(row.drafts), tip, hollow=True)
    return found
