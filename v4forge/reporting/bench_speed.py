"""The speed bench in the report: how fast at which concurrency, and what drafts gain.

Pure functions of a result file's content (bench/results.py). A key that it lacks is a KeyError; the caller knows
the file.
"""

from __future__ import annotations

from collections.abc import Sequence

from v4forge.bench.speed import NO, YES
from v4forge.bench.standing import Worth
from v4forge.intervals import Estimate
from v4forge.reporting import speed_charts
from v4forge.reporting.speed_points import Speed, SpeedRow, rows
from v4forge.reporting.tables import (
    NONE,
    NOT_MEASURED,
    NOTHING,
    Cell,
    Drawing,
    Figure,
    Found,
    Table,
    columns,
    ends,
    estimated,
    number,
)

__all__ = ["SAID", "TITLE", "drawings", "figures", "overview", "published", "rows", "tables"]

TITLE = "Speed by concurrency"
SAID = "Where drafts stop paying, by output throughput"


def tables(found: Speed, worth: Worth) -> tuple[list[Table], list[str]]:
    """All points, and where drafts stop paying."""
    lines: list[list[Cell]] = []
    without_itl = not any(row.itl_ms for row in found.points)
    for row in found.points:
        heading = Cell(row.shape.replace("x", " tokens in, ") + " out")
        if [heading] not in lines:
            lines.append([heading])
        line = [
            Cell(row.load),
            Cell(f"{row.drafts}"),
            Cell(f"{row.ttft_ms[0]:,.0f}", f"p99 {row.ttft_ms[1]:,.0f}"),
            Cell(f"{row.tpot_ms[0]:,.2f}", f"p99 {row.tpot_ms[1]:,.1f}"),
            *([] if without_itl else [_itl(row)]),
            Cell(f"{row.output_tok_s:,.1f}", f"{row.output_tok_s / found.gpus:,.1f} per GPU" if found.gpus else ""),
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
    if not found.closed:
        return Cell("no point was measured", mark="dim")
    some = [row for row in found.closed if row.shape == found.closed[0].shape]
    least, most = (end(row.concurrency or 0 for row in some) for end in (min, max))
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
    return Cell(f"{row.itl_ms[0]:,.2f}", f"p99 {row.itl_ms[1]:,.1f}") if row.itl_ms else NONE


def _acceptance(row: SpeedRow) -> Cell:
    """The rate, and the length below it."""
    if row.acceptance is None:
        return NONE
    return Cell(f"{100 * row.acceptance:.1f}%", f"length {row.acceptance_length:.2f}")


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
    for row in found.closed:
        at = f"k{row.drafts}/{row.shape}/c{row.concurrency}"
        ours[f"speed/{at}/tpot_ms"] = Found(row.tpot_ms[0], found.conditions, against=against)
        ours[f"speed/{at}/output_tok_s"] = Found(row.output_tok_s, found.conditions, against=against)
        if row.gain is not None:
            speedup = row.gain.tpot_speedup
            said = "; ".join(part for part in (ends(speedup, ".2f"), found.conditions) if part)
            ours[f"speedup/{at}/tpot_ms"] = Found(speedup.value, said, against=against)
    return ours


def figures(found: Speed) -> list[Figure]:
    """Of every point."""
    made = []
    for row in found.points:
        for name, pair in (("TTFT", row.ttft_ms), ("TPOT", row.tpot_ms), ("ITL", row.itl_ms)):
            if pair:
                made.append(Figure(row.key, f"{name}, median", pair[0], "ms"))
                made.append(Figure(row.key, f"{name}, p99", pair[1], "ms"))
        made.append(Figure(row.key, "output throughput", row.output_tok_s, "tok/s"))
        if found.gpus:
            made.append(Figure(row.key, "output throughput per GPU", row.output_tok_s / found.gpus, "tok/s"))
        made.append(Figure(row.key, "tokens a second per user", row.user_tok_s, "tok/s"))
        for name, value, unit in (
            ("goodput", row.goodput_request_s, "req/s"),
            ("acceptance rate", row.acceptance, ""),
            ("acceptance length", row.acceptance_length, "tokens"),
        ):
            if value is not None:
                made.append(Figure(row.key, name, value, unit))
        if row.gain:
            made.append(estimated(row.key, "TPOT speed-up", row.gain.tpot_speedup, "x"))
            made.append(estimated(row.key, "throughput ratio", row.gain.throughput_ratio, "x"))
    return made


def drawings(found: Speed, worth: Worth) -> list[Drawing]:
    """TPOT and throughput by concurrency, what k brings, and throughput per GPU against tok/s per user."""
    return speed_charts.drawings(found, worth.published_model)
