"""The quality bench in the report: lm-eval's tasks, and their differences from the published figures.

Pure functions of a result file's content (bench/results.py). A key that it lacks is a KeyError; the caller knows
the file. Scores are percent.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from v4forge.bench.published_figures import Figure as Published
from v4forge.bench.published_figures import by_key
from v4forge.bench.standing import Worth, worth_of
from v4forge.bench.statistics import SURE, z_test
from v4forge.intervals import NORMAL
from v4forge.reporting import svg
from v4forge.reporting.svg import CARD, LINE, TEXT, Drawn
from v4forge.reporting.tables import NONE, NOTHING, Cell, Drawing, Figure, Found, Json, Table, columns, p_value

TITLE = "Quality"
SAID = ""

ROW = 40  # height of a line of the figure
CROWDED = 4.0  # an interval so many times as long as the others leaves the picture, to both sides


@dataclass(frozen=True)
class QualityRow:
    """One metric of one task, in percent. delta: ours minus the published, points; None where it would say nothing."""

    task: str
    metric: str
    questions: int
    invalid: int
    value: float
    se: float | None
    figure: Published | None  # that it is compared with
    differs: list[str]  # in what the task was run otherwise than the published one
    delta: float | None = None
    delta_se: float | None = None
    p: float | None = None

    @property
    def title(self) -> str:
        return self.figure.title if self.figure else self.task


def rows(result: Json) -> list[QualityRow]:
    """One row a task and metric; those that were published first, in their order."""
    compared = worth_of(result).comparable
    found = []
    for key, part in result["parts"].items():
        task = part.get("task", key)
        for metric, measured in part["metrics"].items():
            row = QualityRow(
                task=task,
                metric=metric,
                questions=int(part["questions"]),
                invalid=int(part.get("invalid") or 0),
                value=100 * float(measured["value"]),
                se=None if measured.get("se") is None else 100 * float(measured["se"]),
                figure=by_key().get(f"quality/{task}/{metric}"),
                differs=[str(each) for each in part.get("differs") or ()],
            )
            found.append(_tested(row) if compared else row)
    order = list(by_key())
    return sorted(found, key=lambda row: order.index(row.figure.key) if row.figure else len(order))


def _tested(row: QualityRow) -> QualityRow:
    """The row with its difference from the published figure and a two-sided test of it."""
    if row.figure is None or row.figure.original is None:
        return row
    found = z_test(vars(row), vars(row.figure.original))
    return replace(row, delta=found["delta"], delta_se=found["se"], p=found["p"])


def tables(found: list[QualityRow], worth: Worth) -> tuple[list[Table], list[str]]:
    """Ours beside the published, and what is beyond noise of all that was tested."""
    lines = []
    for row in found:
        error = "" if row.se is None else f" ±{row.se:.2f}"
        line = [
            Cell(row.title, "" if row.metric in row.title else row.metric),
            Cell(f"{row.questions:,}", f"{row.invalid} without an answer" if row.invalid else ""),
            Cell(f"{row.value:.2f}{error}", "; ".join(row.differs)),
        ]
        original = row.figure.original if row.figure else None
        if original is None:
            line += [NONE, NOTHING]
        elif not worth.comparable:
            line += [Cell("not comparable", mark="dim"), NOTHING]
        else:
            line.append(Cell(f"{original.value:.2f}" + (f" ±{original.se:.2f}" if original.se else "")))
            line.append(_against(row))
        lines.append(line)
    heads = columns("<task", "questions", "ours, %", "published, %", "difference, points")
    note = (
        "± is the standard error. The difference is tested two-sided: p is how often chance alone makes one as large."
    )
    sure = [row for row in found if row.p is not None and row.p < SURE]
    tested = sum(row.p is not None for row in found) if worth.comparable else 0
    said = []
    if tested:
        names = ", ".join(f"{row.title} ({row.delta:+.2f})" for row in sure) or "none"
        said.append(
            f"Beyond noise at 5%: {names}, of {tested} tested; chance alone makes {SURE * tested:.1f} of them so."
        )
    return [Table("quality", "Tasks of lm-eval", heads, lines, note if tested else "± is the standard error.")], said


def _against(row: QualityRow) -> Cell:
    """Ours minus the published in points, ± its standard error, with p; green or red beyond noise."""
    if row.delta is None or row.delta_se is None or row.p is None:
        return Cell("not tested", "no standard error", "dim")
    mark = ("bad" if row.delta < 0 else "good") if row.p < SURE else ""
    return Cell(f"{row.delta:+.2f} ±{row.delta_se:.2f}", p_value(row.p), mark)


def overview(found: list[QualityRow], worth: Worth) -> Cell:
    """What is beyond noise, with how many chance alone makes so."""
    tested = [row for row in found if row.p is not None]
    if not tested:
        return Cell(f"{len(found)} figures, none tested against the published", mark="dim")
    sure = [row for row in tested if row.p is not None and row.p < SURE and row.delta is not None]
    if not sure:
        return Cell(
            f"no difference from the published beyond noise, of {len(tested)} tested",
            mark="good" if worth.complete else "",
        )
    worse = [row for row in sure if (row.delta or 0.0) < 0]
    names = ", ".join(f"{row.title} {row.delta:+.2f} points" for row in sure)
    note = f"{len(tested)} tested at 5%, so chance alone makes {SURE * len(tested):.1f} such"
    return Cell(f"beyond noise: {names}", note, "bad" if worse else "good")


def published(found: list[QualityRow]) -> dict[str, Found]:
    """Each metric that was published, with its test."""
    return {
        row.figure.key: Found(
            row.value, "; ".join(row.differs), row.se, _against(row) if row.p is not None else NOTHING
        )
        for row in found
        if row.figure is not None
    }


def figures(found: list[QualityRow]) -> list[Figure]:
    """Of every metric, in percent."""
    made = []
    for row in found:
        ends = () if row.se is None else (row.value - NORMAL * row.se, row.value + NORMAL * row.se)
        made.append(Figure(row.task, row.metric, row.value, "%", *ends))
    return made


def drawings(found: list[QualityRow], worth: Worth) -> list[Drawing]:
    """Differences from the published figures with 95% intervals; nothing where none was tested."""
    tested = [(row, row.delta, NORMAL * row.delta_se) for row in found if row.delta is not None and row.delta_se]
    if not tested or not worth.comparable:
        return []
    name, title = "quality-delta", "Ours minus the published, points"
    with svg.drawing(height=44 + ROW * len(tested)) as drawn:
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
        drawn.axes.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])
        drawn.axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:+g}" if abs(tick) > 1e-9 else "0")
        drawn.axes.grid(axis="x", color=LINE, linewidth=1)
        drawn.axes.set_axisbelow(True)
        drawn.frame(left=14, right=14, top=8, bottom=28)
        picture = drawn.svg(name, title, "; ".join(about))
    note = "95% intervals, with an arrow where one goes on; right of 0 ours is better"
    return [Drawing(name, title, picture, note)]


def _difference(drawn: Drawn, title: str, delta: float, margin: float, y: int, edge: float) -> str:
    """One line: an interval, cut at both edges with an arrow there, under its name and figures; said in words."""
    ink, low, high = svg.series(1), delta - margin, delta + margin
    figures = f"{delta:+.2f} ({low:+.2f} to {high:+.2f})"
    drawn.bar([max(low, -edge), min(high, edge)], [y, y], ink)
    for beyond, at, marker in ((low < -edge, -edge, "<"), (high > edge, edge, ">")):
        if beyond:
            drawn.axes.plot([at], [y], marker=marker, color=ink.colour, markersize=6, clip_on=False)
    if abs(delta) <= edge:
        drawn.mark(delta, y, ink, f"{title}: {figures}")
    for x, text, side in ((0.0, svg.label(title, 26, 1), "left"), (1.0, figures, "right")):
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
