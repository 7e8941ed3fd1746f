"""The drawings of the speed bench: TPOT and throughput by concurrency, what k brings, throughput per GPU against tokens
a second per user."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from v4forge.bench.published_figures import by_key
from v4forge.intervals import Estimate
from v4forge.reporting import svg
from v4forge.reporting.speed_points import Speed, SpeedRow
from v4forge.reporting.svg import Drawn
from v4forge.reporting.tables import Drawing


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


def drawings(found: Speed, with_published: bool) -> list[Drawing]:
    """For each shape TPOT and output throughput by concurrency, a line a k, published ones hollow; what k brings; and
    throughput against what one user sees."""
    drawn = []
    for shape in dict.fromkeys(row.shape for row in found.points):
        of = f"{shape.replace('x', ' in, ')} out"
        some = [row for row in found.closed if row.shape == shape]
        for metric in METRICS if some else ():
            name, title = f"speed-{metric.name}-{shape}", f"{metric.title}, {of}"
            picture = _by_concurrency(name, title, metric, some, with_published)
            drawn.append(Drawing(name, title, picture, metric.note))
        drawn += _by_k(f"speed-k-{shape}", f"What k brings, {of}", some)
        every = [row for row in found.points if row.shape == shape]
        drawn += _for_each_user(f"speed-pareto-{shape}", of, every, found.gpus)
    return drawn


def _by_concurrency(name: str, title: str, metric: Metric, points: Sequence[SpeedRow], with_published: bool) -> str:
    with svg.drawing() as drawn:
        concurrencies = sorted({row.concurrency or 0 for row in points})
        drafts = sorted({row.drafts for row in points})
        about, heights, entries, hollow = [], [0.0], [], False
        for at, k in enumerate(drafts):
            line = sorted((row for row in points if row.drafts == k), key=lambda row: row.concurrency or 0)
            offset = 0.07 * (at - (len(drafts) - 1) / 2)
            x = [concurrencies.index(row.concurrency or 0) + offset for row in line]
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


def _by_k(name: str, title: str, points: Sequence[SpeedRow]) -> list[Drawing]:
    """Acceptance length and gains on one axis, all of them 1 without drafts; none where there is no gain to show."""
    gained = [row for row in points if row.gain]
    if not gained:
        return []
    least, most = (end(row.concurrency or 0 for row in gained) for end in (min, max))
    ones: dict[int, tuple[float, Estimate | None]] = {0: (1.0, None)}
    alone, busy = ([row for row in gained if row.concurrency == at] for at in (least, most))
    lines = [
        ("acceptance length", ones | {row.drafts: (row.acceptance_length or math.nan, None) for row in alone}),
        ("TPOT speed-up", ones | {r.drafts: (r.gain.tpot_speedup.value, r.gain.tpot_speedup) for r in alone if r.gain}),
        (
            "throughput ratio",
            ones | {r.drafts: (r.gain.throughput_ratio.value, r.gain.throughput_ratio) for r in busy if r.gain},
        ),
    ]
    lines = [(what, {k: each for k, each in sorted(line.items()) if not math.isnan(each[0])}) for what, line in lines]
    lines = [(what, line) for what, line in lines if len(line) > 1]
    ks = sorted({k for _, line in lines for k in line})
    rates = {row.drafts: f", acceptance rate {row.acceptance:.1%}" for row in alone if row.acceptance is not None}
    with svg.drawing() as drawn:
        heights, about = [1.0], []
        for number, (what, line) in enumerate(lines, start=1):
            ink = svg.series(number)
            drawn.line([ks.index(k) for k in line], [value for value, _ in line.values()], ink)
            for k, (value, interval) in line.items():
                if interval and not math.isnan(interval.low):
                    drawn.bar([ks.index(k)] * 2, [interval.low, interval.high], ink)
                    heights.append(interval.high)
                heights.append(value)
                drawn.mark(
                    ks.index(k), value, ink, f"k={k}: {what} {value:.2f}{rates.get(k, '') if number == 1 else ''}"
                )
            about.append(f"{what}: " + ", ".join(f"{value:.2f} at k={k}" for k, (value, _) in line.items()))
        drawn.across(range(len(ks)), [str(k) for k in ks], "k, num_speculative_tokens")
        drawn.axes.set_xlim(-0.3, len(ks) - 0.7)
        drawn.upwards(svg.axis(max(heights)), lambda tick: f"{tick:g}x")
        drawn.legend([(what, svg.series(number), False) for number, (what, _) in enumerate(lines, start=1)])
        drawn.frame(left=40, right=14, top=30, bottom=40)
        picture = drawn.svg(name, title, "; ".join(about))
    note = f"length and speed-up at concurrency {least}, throughput at {most}; 95% intervals; 1x is k=0"
    return [Drawing(name, title, picture, note)]


def frontier(points: Sequence[SpeedRow]) -> list[SpeedRow]:
    """Those that no other beats in throughput and in what one user sees: Pareto's, by the latter."""
    best: list[SpeedRow] = []
    for row in sorted(points, key=lambda row: (row.user_tok_s, row.output_tok_s), reverse=True):
        if not best or row.output_tok_s > best[-1].output_tok_s:
            best.append(row)
    return best[::-1]


def _for_each_user(name: str, of: str, points: Sequence[SpeedRow], gpus: int | None) -> list[Drawing]:
    """Every point, a line a k in the order of its load; none of fewer than two."""
    if len(points) < 2:
        return []
    unit = "tok/s per GPU" if gpus else "tok/s"
    title = f"Pareto: {'per GPU' if gpus else 'throughput'} against per user, {of}"
    with svg.drawing() as drawn:
        about, best = [], frontier(points)

        def place(row: SpeedRow) -> tuple[float, float]:
            return row.user_tok_s, row.output_tok_s / (gpus or 1)

        drafts = sorted({row.drafts for row in points})
        for k in drafts:
            for row in (row for row in points if row.drafts == k):
                x, y = place(row)
                said = f"k={k}, {row.load}: {y:,.1f} {unit}, {x:,.1f} tok/s per user"
                drawn.mark(x, y, svg.series(k), said, hollow=row.request_rate is not None)
                about.append(said)
        across, upwards = zip(*map(place, best), strict=True)
        drawn.line(across, upwards, svg.series(0), dashed=True)
        ticks = svg.axis(max(place(row)[0] for row in points))
        drawn.across(ticks, [f"{tick:,g}" for tick in ticks], "tok/s per user, 1 / TPOT")
        drawn.axes.set_xlim(ticks[0], ticks[-1])
        drawn.upwards(svg.axis(max(place(row)[1] for row in points)), lambda tick: f"{tick:,g}")
        entries = [(f"k={k}", svg.series(k), False) for k in drafts]
        at_rate = any(row.request_rate is not None for row in points)
        drawn.legend([*entries, *([("at a rate", svg.series(0), True)] if at_rate else [])])
        drawn.frame(left=50, right=18, top=30, bottom=40)
        picture = drawn.svg(name, title, "; ".join(about))
    return [Drawing(name, title, picture, f"output {unit}; the dashed line joins what nothing beats in both")]
