"""The pen of all figures: inline SVG by matplotlib, in the page's own colours, so that they read in light and dark.

The same figures give the same bytes. Text stays text. A figure's units are CSS pixels at its natural width; it is
narrow enough to be read on a telephone, so that wide pages put several side by side. matplotlib is imported where
something is drawn, so that who takes only tables from a module that draws too does without it.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 360, 240
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "v4forge",
    "font.family": "DejaVu Sans",  # wider than what browsers take, so that what fits in it fits
    "font.size": 11,
    "axes.linewidth": 1,
    "lines.linewidth": 2,
}


@dataclass(frozen=True)
class Ink:
    """What a line and its marks are drawn with."""

    colour: str
    marker: str = "o"


# Colours that matplotlib is told, for the variables of style.html.j2 that the page shall use.
TEXT, LINE, CARD = "#010101", "#020202", "#030303"
SERIES = tuple(Ink(f"#0a0a0{number}", marker) for number, marker in enumerate("os^Dv"))
BAD = Ink("#0b0b00")
VARIABLES = {
    TEXT: "var(--dim)",
    LINE: "var(--line)",
    CARD: "var(--card)",
    BAD.colour: "var(--bad)",
    **{ink.colour: f"var(--series-{number})" for number, ink in enumerate(SERIES)},
}
DASHES: Any = (0, (4, 2))  # of what others are compared with
LABEL_WIDTH, LABEL_LINES = 9, 2
LOG_TICKS = 7
LOG_ZERO = 0.1  # counts are whole: a decade below one there is room for none


def series(number: int) -> Ink:
    """The ink of a series; after the last the first again."""
    return SERIES[number % len(SERIES)]


class Drawn:
    """A figure while it is drawn: one pair of axes, and what is said when one points at a mark."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width / 72, height / 72))
        self.figure.patch.set_visible(False)
        FigureCanvasSVG(self.figure)
        self.axes: Any = self.figure.add_subplot()
        self.axes.patch.set_visible(False)
        self.tips: list[str] = []
        for side, spine in self.axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(LINE)
        self.axes.tick_params(length=0, colors=TEXT, labelcolor=TEXT)

    def mark(self, x: float, y: float, ink: Ink, tip: str, hollow: bool = False, pointed_at: bool = False) -> None:
        """pointed_at: seen only then, as one of very many."""
        self.axes.plot(
            *([x], [y]),
            marker=ink.marker,
            markersize=6.5,
            color=ink.colour,
            markerfacecolor=CARD if hollow else ink.colour,
            markeredgewidth=1.6,
            gid=f"{'pointed' if pointed_at else 'tip'}{len(self.tips)}",
            zorder=4,
            clip_on=False,
        )
        self.tips.append(tip)

    def line(self, x: Sequence[float], y: Sequence[float], ink: Ink, dashed: bool = False) -> None:
        """Through all these points."""
        linestyle = DASHES if dashed else "solid"
        self.axes.plot(*(x, y), color=ink.colour, linestyle=linestyle, zorder=3, clip_on=False)

    def bar(self, x: Sequence[float], y: Sequence[float], ink: Ink) -> None:
        """An error bar between two points."""
        self.axes.plot(x, y, color=ink.colour, linewidth=1.4, zorder=2, clip_on=False)

    def block(self, x: tuple[float, float], y: tuple[float, float], ink: Ink, opacity: float, tip: str) -> None:
        """A rectangle from x[0] to x[1] and y[0] to y[1]."""
        from matplotlib.patches import Rectangle

        corner, size = (x[0], y[0]), (x[1] - x[0], y[1] - y[0])
        self.axes.add_patch(
            Rectangle(corner, *size, color=ink.colour, alpha=opacity, linewidth=0, gid=f"tip{len(self.tips)}")
        )
        self.tips.append(tip)

    def legend(self, entries: Sequence[tuple[str, Ink, bool]]) -> None:
        """entries: label, ink, hollow; in a line above the axes."""
        from matplotlib.lines import Line2D

        handles = [
            Line2D(
                *([], []),
                color=ink.colour,
                marker=ink.marker,
                markerfacecolor=CARD if hollow else ink.colour,
                linestyle="none",
                markersize=6.5,
                label=label,
            )
            for label, ink, hollow in entries
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

    def across(self, ticks: Sequence[float], labels: Sequence[str], title: str = "") -> None:
        """The horizontal axis."""
        self.axes.set_xticks(ticks, labels)
        if title:
            self.axes.set_xlabel(title, color=TEXT, labelpad=3)

    def upwards(self, ticks: Sequence[float], shown: Callable[[float], str], logarithmic: bool = False) -> None:
        """The vertical axis, from the first of these ticks to the last, with a line across at each whose label is not
        ''."""
        if logarithmic:
            self.axes.set_yscale("log")
            self.axes.minorticks_off()
            ticks = [max(tick, LOG_ZERO) for tick in ticks]
        self.axes.set_ylim(ticks[0], ticks[-1])
        labels = {tick: shown(0.0 if tick == LOG_ZERO and logarithmic else tick) for tick in ticks}
        self.axes.set_yticks([tick for tick in ticks if labels[tick]], [label for label in labels.values() if label])
        self.axes.grid(axis="y", color=LINE, linewidth=1)
        self.axes.set_axisbelow(True)

    def frame(self, left: int, right: int, top: int, bottom: int) -> None:
        """Margins in pixels."""
        width, height = self.figure.get_size_inches() * 72
        self.figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)

    def svg(self, name: str, title: str, about: str) -> str:
        """The drawing as an SVG element; about: what a person who does not see it should know."""
        text = io.StringIO()
        self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        return _inline(text.getvalue(), name, title, about, self.tips)


@contextmanager
def drawing(width: int = WIDTH, height: int = HEIGHT) -> Iterator[Drawn]:
    """A figure to draw on, and to take as SVG before the end: SETTINGS hold until then."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        yield Drawn(width, height)


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
        said = f"<title>{html.escape(tip)}</title>"
        body = body.replace(f'<g id="tip{number}">', f"<g>{said}", 1)
        body = body.replace(f'<g id="pointed{number}">', f'<g class="pointed">{said}', 1)
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


def axis(highest: float) -> list[float]:
    """Ticks from zero to at least `highest`, at most five steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not highest > 1e-9:  # no loss that a picture could show
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * 5 >= highest * (1 - 1e-9))
    return [float(f"{step * n:.6g}") for n in range(math.ceil(highest / step - 1e-9) + 1)]


def log_axis(fewest: int, most: int) -> list[float]:
    """Ticks around these counts, powers of ten and, unless that were too many, 2 and 5 times them; 0 before all."""
    ticks: list[float] = []
    for factors in ((1, 2, 5), (1,)):
        marks = [0.0, *(f * 10.0**power for power in range(math.ceil(math.log10(most)) + 1) for f in factors)]
        lowest = max(mark for mark in marks if mark <= fewest)
        highest = min(mark for mark in marks if mark >= most)
        ticks = [mark for mark in marks if lowest <= mark <= highest]
        if len(ticks) <= LOG_TICKS:
            break
    return ticks
