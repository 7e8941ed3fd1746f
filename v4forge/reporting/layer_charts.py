"""Figures by layer: what INT4 loses, how many tokens the experts saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from v4forge.quantization.layer_reports import KINDS, LayerRow
from v4forge.reporting import svg
from v4forge.reporting.svg import BAD, LOG_ZERO, Ink
from v4forge.reporting.tables import Drawing

THIRD, HALF, HEIGHT = 300, 420, 196  # as wide as where three, or two, stand side by side
X_LABELS = 9
MANY = 16  # layers, of more of which a mark is seen only when one points at it
LOG_RATIO = 20  # most to fewest tokens, above which their axis is logarithmic
# A heat map's rows in pixels, all together about; and what is left free between them, as a share.
ROW_LEAST, ROW_MOST, ROWS, GAP = 6, 22, 240, 0.04
# Tokens in even shares (all tokens of the layer by its experts): up to which a level goes, how it is called, how dark.
EDGES = (0.25, 0.5, 1, 2, 4)
LOADS = (("below ¼", 0.1), ("¼", 0.24), ("½", 0.4), ("1", 0.6), ("2", 0.8), ("4 and more", 1.0))
# The colours of style.html.j2's keys, which have no marks.
NUMBERS = {"most": 0, "gptq": 1, "rtn": 2, "same_scales": 3, "median": 3, "fewest": 4}
INKS = {"starved": BAD, **{name: Ink(svg.series(number).colour) for name, number in NUMBERS.items()}}


@dataclass(frozen=True)
class Line:
    """A value for each layer, and what is said of it when one points at it. `name` is one of INKS."""

    name: str
    values: Sequence[float]
    said: Sequence[str]

    @property
    def ink(self) -> Ink:
        return INKS[self.name]

    @property
    def baseline(self) -> bool:
        """Whether it is what another is compared with."""
        return self.name in ("rtn", "same_scales")


def loss_charts(rows: Sequence[LayerRow]) -> list[Drawing]:
    """One figure a matrix kind, all on one scale that begins at zero, of the layers that were quantized."""
    rows = [row for row in rows if row.losses]
    if not rows:
        return []
    highest = max((max(loss.rtn, loss.gptq) for row in rows for loss in row.losses.values()), default=0.0)
    charts = []
    for kind, title in KINDS.items():
        lines = []
        for method in ("rtn", "same_scales", "gptq"):
            values = [getattr(row.losses[kind], method) for row in rows]
            if None in values:  # reports of an earlier version
                continue
            lines.append(Line(method, values, [f"{value:.3g}%" for value in values]))
        charts.append(_by_layer(f"loss-{kind}", title, rows, lines, svg.axis(highest), lambda tick: f"{tick:.6g}%"))
    return charts


def token_charts(rows: Sequence[LayerRow]) -> list[Drawing]:
    """Tokens per expert, and how many experts had too few."""
    fewest, most = min(row.fewest for row in rows), max(row.most for row in rows)
    logarithmic = most > LOG_RATIO * fewest
    title = "Tokens per expert, logarithmic" if logarithmic else "Tokens per expert"
    ticks = svg.log_axis(fewest, most) if logarithmic else svg.axis(most)
    tokens = []
    for name in ("most", "median", "fewest"):
        values = [getattr(row, name) for row in rows]
        tokens.append(Line(name, values, [f"{name} {value:,.0f} tokens" for value in values]))
    starved = [len(row.blended) for row in rows]
    starving = Line("starved", starved, [f"{len(row.blended)} of {row.experts} experts" for row in rows])
    return [
        _by_layer("tokens", title, rows, tokens, ticks, _count, logarithmic, HALF),
        _by_layer("starved", "Starved experts", rows, [starving], svg.axis(max(5, *starved)), _count, width=HALF),
    ]


def load_level(tokens: int, even: float) -> int:
    """0 for the fewest tokens to the last of LOADS, by how many times an even share they are."""
    return sum(tokens >= edge * even for edge in EDGES)


def heat_map(rows: Sequence[LayerRow]) -> list[Drawing]:
    """Tokens per expert: a row a layer, its experts from the fewest tokens to the most, the starved ones red."""
    name, title = "tokens-by-expert", "Tokens per expert, by layer"
    widest = max(row.experts for row in rows)
    tall = min(ROW_MOST, max(ROW_LEAST, ROWS // len(rows)))
    top, bottom = 8, 38
    with svg.drawing(HALF, top + bottom + tall * len(rows)) as drawn:
        for at, row in enumerate(rows):
            starved = {int(note["expert"]) for note in row.blended}
            for begin, run in _runs(row, starved):
                counts = [row.tokens[expert] for expert in run]
                level = load_level(counts[0], sum(row.tokens) / row.experts)
                bad = run[0] in starved
                span = " to ".join(dict.fromkeys(f"{count:,}" for count in (counts[0], counts[-1])))
                said = f"layer {row.layer}: {len(run)} of {row.experts} experts, {span} tokens"
                drawn.block(
                    (begin, begin + len(run)),
                    (at - 0.5 + GAP, at + 0.5 - GAP),
                    BAD if bad else svg.series(1),
                    1.0 if bad else LOADS[level][1],
                    said + ", starved" * bad,
                )
        drawn.across([0, widest / 2, widest], ["fewest tokens", f"{widest} experts", "most"])
        for label, side in zip(drawn.axes.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set_horizontalalignment(side)
        drawn.axes.set_xlim(0, widest)
        every = math.ceil(len(rows) / X_LABELS)
        drawn.axes.set_yticks(range(len(rows))[::every], [str(row.layer) for row in rows[::every]])
        drawn.axes.set_ylim(len(rows) - 0.5, -0.5)
        drawn.frame(left=42, right=12, top=top, bottom=bottom)
        picture = drawn.svg(name, title, f"{title}; the table below has the fewest, median and most, and who starved")
    return [Drawing(name, title, picture)]


def _runs(row: LayerRow, starved: set[int]) -> list[tuple[int, list[int]]]:
    """(place of the first, experts) of each run of experts that look alike, the fewest tokens first."""
    even = sum(row.tokens) / row.experts
    order = sorted(range(row.experts), key=lambda expert: (row.tokens[expert], expert))
    found: list[tuple[int, list[int]]] = []
    for _, run in itertools.groupby(order, key=lambda each: (each in starved, load_level(row.tokens[each], even))):
        found.append((sum(len(each) for _, each in found), list(run)))
    return found


def _count(tick: float) -> str:
    """A whole number, in thousands or millions where it is large; '' for what is none."""
    if tick != int(tick):
        return ""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if tick >= unit:
            return f"{tick / unit:g}{suffix}"
    return f"{tick:g}"


def _by_layer(
    name: str,
    title: str,
    rows: Sequence[LayerRow],
    lines: Sequence[Line],
    ticks: Sequence[float],
    shown: Callable[[float], str],
    logarithmic: bool = False,
    width: int = THIRD,
) -> Drawing:
    """ticks: of the vertical axis, with what is shown of each."""
    with svg.drawing(width, HEIGHT) as drawn:
        places = range(len(rows))
        for line in lines:
            heights = [max(value, LOG_ZERO) if logarithmic else value for value in line.values]
            drawn.line(places, heights, line.ink, dashed=line.baseline)
            for place, row, height, said in zip(places, rows, heights, line.said, strict=True):
                tip = f"layer {row.layer}, {row.attention}: {said}"
                drawn.mark(place, height, line.ink, tip, hollow=line.baseline, pointed_at=len(rows) > MANY)
        every = math.ceil(len(rows) / X_LABELS)
        drawn.across(places[::every], [str(row.layer) for row in rows[::every]], "layer")
        drawn.axes.tick_params(axis="x", pad=7)  # below marks at zero
        drawn.axes.set_xlim(-0.5, len(rows) - 0.5)
        drawn.upwards(ticks, shown, logarithmic)
        drawn.frame(left=42, right=12, top=10, bottom=38)
        return Drawing(name, title, drawn.svg(name, title, f"{title} by layer; the table below has the figures"))
