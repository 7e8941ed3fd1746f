"""Figures of the benches as inline SVG, by matplotlib, in the page's own colours, so that they read in light and dark.

The same rows give the same bytes. Text stays text. A figure's units are CSS pixels at its natural width; it is narrow
enough to be read on a telephone, so that wide pages put several side by side.
"""

from __future__ import annotations

import html
import io
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import matplotlib.lines
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from v4forge.bench import published_figures
from v4forge.bench.bench_rows import (
    AcceptanceRow,
    Json,
    Offline,
    QualityRow,
    SpeedRow,
    acceptance_rows,
    offline,
    quality_rows,
    speed_rows,
    standing,
)
from v4forge.intervals import Estimate
from v4forge.reporting.layer_charts import axis
from v4forge.reporting.tables import Drawing

WIDTH, HEIGHT = 360, 240
ROW = 40  # height of a line of the quality figure
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "v4forge",
    "font.family": "DejaVu Sans",  # wider than what browsers take, so that what fits in it fits
    "font.size": 11,
    "axes.linewidth": 1,
    "lines.linewidth": 2,
}
# Colours that matplotlib is told, for the variables of style.html.j2 that the page shall use.
TEXT, LINE, CARD = "#010101", "#020202", "#030303"
SERIES = ("#0a0a00", "#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
VARIABLES = {
    TEXT: "var(--dim)",
    LINE: "var(--line)",
    CARD: "var(--card)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)},
}
MARKERS = ("o", "s", "^", "D", "v")
NO_DRAFTS: Any = (0, (4, 2))  # dashes of what others are compared with
LABEL_WIDTH, LABEL_LINES = 9, 2
NORMAL_95 = 1.96
CROWDED = 4.0  # an interval so many times as long as the others leaves the picture, to both sides


class Drawn:
    """A figure while it is drawn: one pair of axes, and what is said when one points at a mark."""

    def __init__(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.figure = Figure(figsize=(width / 72, height / 72))
        self.figure.patch.set_visible(False)
        FigureCanvasSVG(self.figure)
        self.axes: Axes = self.figure.add_subplot()
        self.axes.patch.set_visible(False)
        self.tips: list[str] = []
        for side, spine in self.axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(LINE)
        self.axes.tick_params(length=0, colors=TEXT, labelcolor=TEXT)

    def mark(self, x: float, y: float, series: int, tip: str, hollow: bool = False) -> None:
        colour = SERIES[series % len(SERIES)]
        self.axes.plot(
            *([x], [y]),
            marker=MARKERS[series % len(MARKERS)],
            markersize=6.5,
            color=colour,
            markerfacecolor=CARD if hollow else colour,
            markeredgewidth=1.6,
            gid=f"tip{len(self.tips)}",
            zorder=4,
            clip_on=False,
        )
        self.tips.append(tip)

    def bar(self, x: Sequence[float], y: Sequence[float], series: int) -> None:
        """An error bar between two points."""
        self.axes.plot(x, y, color=SERIES[series % len(SERIES)], linewidth=1.4, zorder=2, clip_on=False)

    def legend(self, entries: Sequence[tuple[str, int, bool]]) -> None:
        """entries: label, series, hollow; in a line above the axes."""
        handles = [
            matplotlib.lines.Line2D(
                *([], []),
                color=SERIES[series % len(SERIES)],
                marker=MARKERS[series % len(MARKERS)],
                markerfacecolor=CARD if hollow else SERIES[series % len(SERIES)],
                linestyle="none",
                markersize=6.5,
                label=label,
            )
            for label, series, hollow in entries
        ]
        self.figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.0, 1.0),
            ncol=len(handles),
            frameon=False,
            labelcolor=TEXT,
            handlelength=0.9,
            handletextpad=0.35,
            columnspacing=1.0,
            borderpad=0.1,
        )

    def frame(self, left: int, right: int, top: int, bottom: int) -> None:
        """Margins in pixels."""
        width, height = self.figure.get_size_inches() * 72
        self.figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)

    def svg(self, name: str, title: str, about: str) -> str:
        """The drawing as an SVG element; about: what a person who does not see it should know."""
        text = io.StringIO()
        with matplotlib.rc_context(SETTINGS):
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        return _inline(text.getvalue(), name, title, about, self.tips)


def _inline(svg: str, name: str, title: str, about: str, tips: Sequence[str]) -> str:
    """matplotlib's document as an element of a page that holds others: no names that clash, no rules for all."""
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]+"', body)
    assert box, "matplotlib writes a view box"
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    for part in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<clipPath.*?</clipPath>", r"<!--.*?-->"):
        body = re.sub(part, "", body, flags=re.DOTALL)
    body = re.sub(r' clip-path="[^"]*"', "", body)
    for number, tip in enumerate(tips):
        body = body.replace(f'<g id="tip{number}">', f"<g><title>{html.escape(tip)}</title>", 1)
    used = {
        found: f"{name}-{number}" for number, found in enumerate(dict.fromkeys(re.findall(r'href="#([^"]+)"', body)))
    }
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{used[found[1]]}"' if found[1] in used else "", body)
    body = re.sub(r'xlink:href="#([^"]+)"', lambda found: f'href="#{used[found[1]]}"', body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r"\s*\n\s*", "\n", re.sub(r"<defs>\s*</defs>", "", body)).strip()
    return (
        f'<svg class="figure" {box[0]} role="img" aria-labelledby="{name}-title {name}-about">\n'
        f'<title id="{name}-title">{html.escape(title)}</title>\n<desc id="{name}-about">{html.escape(about)}</desc>\n'
        f"{body}\n</svg>"
    )


def label(text: str, width: int = LABEL_WIDTH, lines: int = LABEL_LINES) -> str:
    """A name in at most so many lines of about so many letters."""
    wrapped = textwrap.wrap(text, width, break_long_words=True) or [""]
    return "\n".join(wrapped[:lines]) + ("…" if len(wrapped) > lines else "")


@dataclass(frozen=True)
class Metric:
    """A figure of points of the speed bench, as it is drawn."""

    name: str  # in published keys
    title: str
    unit: str
    note: str
    value: Callable[[SpeedRow], float]
    quartiles: Callable[[SpeedRow], tuple[float, float] | None] = lambda row: None


METRICS = (
    Metric(
        *("tpot_ms", "Time a token", "ms a token", "milliseconds, median and quartiles of the requests"),
        value=lambda row: row.tpot_ms[0],
        quartiles=lambda row: row.quartiles_ms,
    ),
    Metric(
        *("output_tok_s", "Tokens a second", "tok/s", "of all requests together"),
        value=lambda row: row.output_tok_s,
    ),
)


def speed(rows: Sequence[SpeedRow], with_published: bool) -> list[Drawing]:
    """For each shape the time a token and the tokens a second, by concurrency, a line a k.

    with_published: also the published figures of the same shape, hollow.
    """
    drawings = []
    for shape in dict.fromkeys(row.shape for row in rows):
        some = [row for row in rows if row.shape == shape]
        for metric in METRICS:
            name = f"speed-{metric.name}-{shape}"
            title = f"{metric.title}, {shape.replace('x', ' in, ')} out"
            drawings.append(
                Drawing(name, title, _by_concurrency(name, title, metric, some, with_published), metric.note)
            )
    return drawings


def _by_concurrency(name: str, title: str, metric: Metric, rows: Sequence[SpeedRow], with_published: bool) -> str:
    with matplotlib.rc_context(SETTINGS):
        drawn = Drawn()
        concurrencies = sorted({row.concurrency for row in rows})
        drafts = sorted({row.drafts for row in rows})
        about, heights, hollow = [], [0.0], False
        for number, k in enumerate(drafts):
            line = sorted((row for row in rows if row.drafts == k), key=lambda row: row.concurrency)
            offset = 0.07 * (number - (len(drafts) - 1) / 2)
            x = [concurrencies.index(row.concurrency) + offset for row in line]
            heights += _line(drawn, metric, k, x, line)
            if with_published:
                originals = _originals(drawn, metric, k, x, line)
                heights, hollow = heights + originals, hollow or bool(originals)
            figures = ", ".join(f"{metric.value(row):,.2f} at {row.concurrency}" for row in line)
            about.append(f"{_drafts(k)}: {figures}")
        drawn.axes.set_xticks(range(len(concurrencies)), [str(c) for c in concurrencies])
        drawn.axes.set_xlim(-0.4, len(concurrencies) - 0.6)
        drawn.axes.set_xlabel("requests at once", color=TEXT, labelpad=3)
        _upwards(drawn, max(heights), lambda tick: f"{tick:,g}")
        entries = [(_drafts(k), k, False) for k in drafts]
        drawn.legend([*entries, *([("published", 0, True)] if hollow else [])])
        drawn.frame(left=50, right=12, top=30, bottom=40)
        return drawn.svg(name, title, f"{metric.unit} by requests at once. " + "; ".join(about))


def _drafts(k: int) -> str:
    return f"k={k}" if k else "no drafts"


def _line(drawn: Drawn, metric: Metric, k: int, x: Sequence[float], rows: Sequence[SpeedRow]) -> list[float]:
    """The points of one k, joined, with their quartiles; how high it all reaches."""
    y = [metric.value(row) for row in rows]
    drawn.axes.plot(
        *(x, y), color=SERIES[k % len(SERIES)], linestyle="solid" if k else NO_DRAFTS, zorder=3, clip_on=False
    )
    reached = list(y)
    for at, height, row in zip(x, y, rows, strict=True):
        drawn.mark(at, height, k, f"{_drafts(k)}, {row.concurrency} at once: {height:,.2f} {metric.unit}")
        if quartiles := metric.quartiles(row):
            drawn.bar([at, at], quartiles, k)
            reached.append(quartiles[1])
    return reached


def _originals(drawn: Drawn, metric: Metric, k: int, x: Sequence[float], rows: Sequence[SpeedRow]) -> list[float]:
    """What was published of the same points, hollow."""
    found = []
    for at, row in zip(x, rows, strict=True):
        figure = published_figures.by_key().get(f"speed/k{k}/{row.shape}/c{row.concurrency}/{metric.name}")
        if figure and figure.original:
            found.append(figure.original.value)
            tip = f"published, {_drafts(k)}, {row.concurrency} at once: {figure.shown(figure.original.value)}"
            drawn.mark(at, figure.original.value, k, tip, hollow=True)
    return found


def _upwards(drawn: Drawn, highest: float, shown: Callable[[float], str]) -> None:
    """A vertical axis from zero, with lines across at its ticks."""
    ticks = axis(highest)
    drawn.axes.set_ylim(0, ticks[-1])
    drawn.axes.set_yticks(ticks, [shown(tick) for tick in ticks])
    drawn.axes.grid(axis="y", color=LINE, linewidth=1)
    drawn.axes.set_axisbelow(True)


def acceptance(rows: Sequence[AcceptanceRow], deep: Offline | None, with_published: bool) -> list[Drawing]:
    """Of all drafts, and where all earlier ones were accepted; by workload, a mark a position."""
    of_all = [(row.title, row.by_position) for row in rows]
    given = [(row.title, row.given_earlier) for row in rows if row.given_earlier]
    if deep:
        given.append(("offline", deep.given_earlier))
    known = [row.published.value if row.published else None for row in rows]
    drawings = []
    for name, title, groups, originals, note in (
        ("draft-all", "Accepted, of all drafts", of_all, known if with_published else [], "only with all before it"),
        ("draft-given", "Accepted, where all earlier drafts were", given, [], "of those whose earlier ones were"),
    ):
        if any(estimates for _, estimates in groups):
            svg = _by_workload(name, title, groups, originals)
            drawings.append(Drawing(name, title, svg, f"95% intervals; draft i {note}"))
    return drawings


def _by_workload(
    name: str, title: str, groups: Sequence[tuple[str, Sequence[Estimate]]], originals: Sequence[float | None]
) -> str:
    """originals: what was published of the first draft, percent, by group."""
    with matplotlib.rc_context(SETTINGS):
        drawn = Drawn()
        most = max(len(estimates) for _, estimates in groups)
        about = []
        for number, (group, estimates) in enumerate(groups):
            for position, each in enumerate(estimates):
                if math.isnan(each.value):
                    continue
                x = number + 0.2 * (position - (most - 1) / 2)
                drawn.bar([x, x], [100 * each.least, 100 * each.most], position + 1)
                said = f"{group}, draft {position + 1}: {100 * each.value:.1f}%"
                if not math.isnan(each.low):
                    said += f" ({100 * each.low:.1f} to {100 * each.high:.1f})"
                drawn.mark(x, 100 * each.value, position + 1, said)
                about.append(said)
            original = originals[number] if originals else None
            if original is not None:
                drawn.mark(
                    number - 0.2 * (most - 1) / 2 - 0.17, original, 0, f"{group}, published: {original:.2f}%", True
                )
        drawn.axes.set_xticks(range(len(groups)), [label(group) for group, _ in groups])
        drawn.axes.set_xlim(-0.55, len(groups) - 0.45)
        _upwards(drawn, 100, lambda tick: f"{tick:g}%")
        entries = [(f"draft {position + 1}", position + 1, False) for position in range(most)]
        drawn.legend([*entries, *([("published", 0, True)] if any(o is not None for o in originals) else [])])
        drawn.frame(left=44, right=8, top=30, bottom=42)
        return drawn.svg(name, title, "; ".join(about))


def quality(rows: Sequence[QualityRow]) -> list[Drawing]:
    """Differences from the published figures with 95% intervals; nothing where none was tested."""
    tested = [(row, row.delta, NORMAL_95 * row.delta_se) for row in rows if row.delta is not None and row.delta_se]
    if not tested:
        return []
    title = "Ours minus the published, points"
    with matplotlib.rc_context(SETTINGS):
        drawn = Drawn(height=44 + ROW * len(tested))
        reaches = [abs(delta) + margin for _, delta, margin in tested]
        edge = 1.08 * max(min(max(reaches), CROWDED * statistics.median(reaches)), 1e-3)
        about = [
            _difference(drawn, row.title, delta, margin, y, edge)
            for y, (row, delta, margin) in zip(reversed(range(len(tested))), tested, strict=True)
        ]
        drawn.axes.axvline(0, color=TEXT, linewidth=1, zorder=1)
        drawn.axes.set_xlim(-edge, edge)
        drawn.axes.set_ylim(-0.5, len(tested) - 0.2)
        drawn.axes.set_yticks([])
        drawn.axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        drawn.axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:+g}" if abs(tick) > 1e-9 else "0")
        drawn.axes.grid(axis="x", color=LINE, linewidth=1)
        drawn.axes.set_axisbelow(True)
        drawn.frame(left=14, right=14, top=8, bottom=28)
        svg = drawn.svg("quality-delta", title, "; ".join(about))
    return [
        Drawing(
            "quality-delta", title, svg, "95% intervals, with an arrow where one goes on; right of 0 ours is better"
        )
    ]


def _difference(drawn: Drawn, title: str, delta: float, margin: float, y: int, edge: float) -> str:
    """One line: an interval, cut at both edges with an arrow there, under its name and figures; said in words."""
    low, high = delta - margin, delta + margin
    figures = f"{delta:+.2f} ({low:+.2f} to {high:+.2f})"
    drawn.bar([max(low, -edge), min(high, edge)], [y, y], 1)
    for beyond, at, marker in ((low < -edge, -edge, "<"), (high > edge, edge, ">")):
        if beyond:
            drawn.axes.plot([at], [y], marker=marker, color=SERIES[1], markersize=6, clip_on=False)
    if abs(delta) <= edge:
        drawn.mark(delta, y, 1, f"{title}: {figures}")
    for x, text, side in ((0.0, label(title, 26, 1), "left"), (1.0, figures, "right")):
        drawn.axes.text(
            *(x, y + 0.27, text),
            transform=drawn.axes.get_yaxis_transform(),
            color=TEXT,
            va="bottom",
            ha=side,
            fontsize=9.5,
            bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1.5},
        )
    return f"{title}: {figures}"


def of(bench: str, result: Json) -> list[Drawing]:
    """The figures of a bench's result; published ones are in them where they may stand beside ours."""
    worth = standing(result)
    drawn: dict[str, Callable[[], list[Drawing]]] = {
        "speed": lambda: speed(speed_rows(result), worth.published_model),
        "draft": lambda: acceptance(acceptance_rows(result), offline(result), worth.published_model),
        "quality": lambda: quality(quality_rows(result)),
    }
    drawings = drawn[bench]() if bench in drawn else []
    return [replace(each, note="; ".join(part for part in (worth.short, each.note) if part)) for each in drawings]
