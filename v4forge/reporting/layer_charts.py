"""Charts by layer, as numbers for a template to draw: losses, tokens of the experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from v4forge.quantization.layer_reports import KINDS, LayerRow

# A chart is drawn in these units, which are CSS pixels at the width where three, or two wide ones, stand side by side.
CHART_WIDTH, WIDE_WIDTH, CHART_HEIGHT = 300, 470, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 34
X_LABELS = 9
LOG_TICKS = 7
LOG_RATIO = 20  # most to fewest tokens, above which their axis is logarithmic
LOG_ZERO = 0.1  # counts are whole: a decade below one there is room for none


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Chart:
    """Some figures over the layers. Ticks are (position, label); lines are by name."""

    title: str
    width: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: dict[str, list[Point]]


@dataclass(frozen=True)
class Scale:
    """A vertical axis with these ticks, upwards."""

    ticks: list[float]
    logarithmic: bool = False

    def y(self, value: float) -> float:
        """Where a value is drawn."""
        low, high, at = (self._height(v) for v in (self.ticks[0], self.ticks[-1], value))
        return round(TOP + (CHART_HEIGHT - TOP - BOTTOM) * (1 - (at - low) / (high - low)), 1)

    def _height(self, value: float) -> float:
        return math.log10(max(value, LOG_ZERO)) if self.logarithmic else value


def loss_charts(rows: Sequence[LayerRow]) -> list[Chart]:
    """One chart a matrix kind, all on one scale that begins at zero."""
    highest = max((max(loss.rtn, loss.gptq) for row in rows for loss in row.losses.values()), default=0.0)
    scale = Scale(axis(highest))
    charts = []
    for kind, title in KINDS.items():
        lines = {
            method: [(getattr(row.losses[kind], method), f"{getattr(row.losses[kind], method):.3g}%") for row in rows]
            for method in ("rtn", "gptq")
        }
        charts.append(_chart(title, CHART_WIDTH, rows, lines, scale, lambda tick: f"{tick:.6g}%"))
    return charts


def token_charts(rows: Sequence[LayerRow]) -> list[Chart]:
    """Tokens per expert, and how many experts had too few."""
    fewest, most = min(row.fewest for row in rows), max(row.most for row in rows)
    logarithmic = most > LOG_RATIO * fewest
    lines = {
        name: [(getattr(row, name), f"{name} {getattr(row, name):,.0f} tokens") for row in rows]
        for name in ("most", "median", "fewest")
    }
    starved = {"starved": [(len(row.blended), f"{len(row.blended)} of {row.experts} experts") for row in rows]}
    starving = axis(max(5, *(len(row.blended) for row in rows)))
    title = "Tokens per expert, logarithmic" if logarithmic else "Tokens per expert"
    scale = Scale(log_axis(fewest, most), True) if logarithmic else Scale(axis(most))
    return [
        _chart(title, WIDE_WIDTH, rows, lines, scale, _count),
        _chart("Starved experts", WIDE_WIDTH, rows, starved, Scale(starving), _count),
    ]


def _count(tick: float) -> str:
    """A whole number, in thousands or millions where it is large; '' for what is none."""
    if tick != int(tick):
        return ""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if tick >= unit:
            return f"{tick / unit:g}{suffix}"
    return f"{tick:g}"


def _chart(
    title: str,
    width: int,
    rows: Sequence[LayerRow],
    lines: Mapping[str, Sequence[tuple[float, str]]],
    scale: Scale,
    label: Callable[[float], str],
) -> Chart:
    """lines: by name a value and its description for each row; a tick whose label is '' is left out."""

    def x(number: int) -> float:
        return round(LEFT + (width - LEFT - RIGHT) * (number + 0.5) / len(rows), 1)

    every = math.ceil(len(rows) / X_LABELS)
    return Chart(
        title,
        width,
        x_ticks=[(x(i), str(row.layer)) for i, row in enumerate(rows) if i % every == 0],
        y_ticks=[(scale.y(tick), label(tick)) for tick in scale.ticks if label(tick)],
        lines={
            name: [
                Point(x(i), scale.y(value), f"layer {row.layer}, {row.attention}: {said}")
                for i, (row, (value, said)) in enumerate(zip(rows, line, strict=True))
            ]
            for name, line in lines.items()
        },
    )


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
