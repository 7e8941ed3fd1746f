"""Tables and sections of figures for people, the same ones for a page and for Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v4forge.intervals import Estimate

Json = Mapping[str, Any]

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Cell:
    """A figure as it is shown; `note` below it says of what or how sure, `mark` is good, bad or dim, `tip` says
    where it is from when one points at it."""

    text: str
    note: str = ""
    mark: str = ""
    tip: str = ""


NONE = Cell("–", mark="dim")
NOTHING = Cell("")


@dataclass(frozen=True)
class Found:
    """Ours of one published figure. `note` says how sure it is, or under which other conditions; `against` is its
    difference from the original, None where that is plain subtraction."""

    value: float
    note: str = ""
    se: float | None = None
    against: Cell | None = None


@dataclass(frozen=True)
class Figure:
    """One figure for programs: of which part of a bench, what, in which unit, with the ends of its 95% interval."""

    part: str
    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Column:
    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """`name` is the table's place on the page; `note` is said below it. A row of one cell heads those after it."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Drawing:
    """A figure of the page, as inline SVG."""

    name: str
    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """What one bench says. `marks` say what its figures are worth, `command` measures what is missing, or again."""

    name: str
    title: str
    command: str
    marks: Sequence[str] = ()
    said: Sequence[str] = ()
    said_title: str = ""
    tables: Sequence[Table] = ()
    drawings: Sequence[Drawing] = ()
    failures: Sequence[tuple[str, str, str]] = ()  # part, fact, hint
    provenance: Sequence[tuple[str, str]] = ()
    measured: bool = True


def columns(*titles: str) -> list[Column]:
    """Columns of figures; one whose title begins with < holds text."""
    return [Column(title.removeprefix("<"), not title.startswith("<")) for title in titles]


def ends(value: Estimate, form: str, scale: float = 1.0) -> str:
    """An interval as low to high, in this format; '' where there is none."""
    return "" if math.isnan(value.low) else f"{scale * value.low:{form}} to {scale * value.high:{form}}"


def plus_minus(value: Estimate, form: str, unit: str = "") -> str:
    """A figure with half the width of its interval, in a line of text."""
    half = (value.high - value.low) / 2
    return f"{value.value:{form}}±{half:{form.removeprefix('+')}}{unit}"


def estimated(part: str, name: str, value: Estimate, unit: str) -> Figure:
    """A figure with its interval."""
    return Figure(part, name, value.value, unit, value.low, value.high)


def percent(value: Estimate) -> Cell:
    """A share with its interval below it."""
    if math.isnan(value.value):
        return NONE
    return Cell(f"{100 * value.value:.1f}%", ends(value, ".1f", 100))


def points(value: Estimate) -> Cell:
    """A difference of shares with its interval below it."""
    if math.isnan(value.value):
        return NONE
    return Cell(f"{100 * value.value:+.1f}", ends(value, "+.1f", 100))


def number(value: float | None, digits: int = 2, unit: str = "") -> Cell:
    """A figure; a dash where there is none."""
    return NONE if value is None or math.isnan(value) else Cell(f"{value:,.{digits}f}{unit}")


def p_value(p: float) -> str:
    """A p-value as people write it."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def plain(text: str) -> str:
    """Text that stays text, and one line, in a Markdown table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def _markdown_cell(cell: Cell) -> str:
    return plain(cell.text) + (f" ({plain(cell.note)})" if cell.note else "")


def _markdown_row(row: Sequence[Cell], width: int) -> list[str]:
    if len(row) < width:
        note = f" ({plain(row[0].note)})" if row[0].note else ""
        return [f"**{plain(row[0].text)}**{note}", *[" "] * (width - 1)]
    return [_markdown_cell(cell) or " " for cell in row]


def markdown_table(table: Table) -> str:
    """A table of GitHub's Markdown; the notes of cells follow them in parentheses."""
    lines = [
        "| " + " | ".join(plain(column.title) or " " for column in table.columns) + " |",
        "|" + "|".join("---:" if column.numeric else "---" for column in table.columns) + "|",
        *("| " + " | ".join(_markdown_row(row, len(table.columns))) + " |" for row in table.rows),
    ]
    return "\n".join(lines) + "\n"


def markdown_titled(table: Table, level: int) -> str:
    """A table under a heading of this level, and its note."""
    lines = [f"{'#' * level} {plain(table.title)}", "", markdown_table(table)]
    return "\n".join([*lines, *([f"{plain(table.note)}\n"] if table.note else [])])


def markdown_section(section: Section, level: int = 2) -> str:
    """A section without its drawings: marks, sentences, tables, what failed, where the figures come from."""
    heading = "#" * level
    lines = [f"{heading} {plain(section.title)}", ""]
    if not section.measured:
        return "\n".join([*lines, f"Not measured: `{section.command}`.", ""])
    lines += [f"**{plain(mark)}.**\n" for mark in section.marks]
    lines += [markdown_titled(table, level + 1) for table in section.tables]
    if section.said:
        lines += [f"{plain(section.said_title)}:\n"] if section.said_title else []
        lines += [*(f"- {plain(sentence)}" for sentence in section.said), ""]
    for part, fact, hint in section.failures:
        lines += [f"Not measured: {plain(part)}: {plain(fact)} ({plain(hint)}).\n"]
    if section.provenance:
        lines += ["<details><summary>Measured how</summary>\n"]
        lines += [f"- {plain(key)}: {plain(value)}" for key, value in section.provenance]
        lines += ["\n</details>\n"]
    return "\n".join(lines)
