"""The tools bench in the report: points for tool calls, short conversations with known outcomes, and what was lost.

Pure functions of a result file's content (bench/results.py). A key that it lacks is a KeyError; the caller knows
the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from v4forge.bench.standing import Worth
from v4forge.reporting.tables import NOTHING, Cell, Drawing, Figure, Found, Json, Table, columns

TITLE = "Tool calls and conversations"
SAID = "What was lost"
POINTS = 30  # of all scenarios
SMOKE_SIZES = {"quick": 4, "quality": 4, "coding": 2}
REASONS_SHOWN, REASON_SHOWN = 2, 160  # of a scenario that lost points, and characters of them


@dataclass(frozen=True)
class ToolRow:
    """A category of tool-calling scenarios."""

    category: str
    scenarios: list[tuple[str, int, int]]  # name, points, most
    reasons: list[str]  # of points that are missing

    @property
    def score(self) -> int:
        return sum(score for _, score, _ in self.scenarios)

    @property
    def most(self) -> int:
        return sum(most for _, _, most in self.scenarios)


@dataclass(frozen=True)
class SmokeRow:
    """A group of short conversations with known outcomes."""

    group: str
    passed: int
    of: int
    reasons: list[str]


@dataclass(frozen=True)
class Conversations:
    """What a result file says: scenarios by category, conversations by group."""

    tools: list[ToolRow]
    smoke: list[SmokeRow]

    @property
    def score(self) -> int:
        return sum(row.score for row in self.tools)

    @property
    def most(self) -> int:
        return sum(row.most for row in self.tools)


def rows(result: Json) -> Conversations:
    """Categories in the order of the file; groups quick, quality, coding."""
    scenarios: dict[str, list[Json]] = {}
    groups: dict[str, list[tuple[str, Json]]] = {}
    for key, part in result["parts"].items():
        if key.startswith("smoke/"):
            groups.setdefault(part["group"], []).append((key, part))
        else:
            scenarios.setdefault(part["category"], []).append(part)
    names = [*(name for name in SMOKE_SIZES if name in groups), *(name for name in groups if name not in SMOKE_SIZES)]
    return Conversations([_tool_row(*each) for each in scenarios.items()], [_smoke_row(n, groups[n]) for n in names])


def _tool_row(category: str, parts: Iterable[Json]) -> ToolRow:
    points = [(str(part["scenario"]), int(part["score"]), int(part["most"])) for part in parts]
    lost = [part for part in parts if part["score"] < part["most"]]
    return ToolRow(category, points, [f"{part['scenario']}: {_why(part['why'])}" for part in lost])


def _why(reasons: Sequence[str]) -> str:
    """What points were lost for, without the checks that hold; the result file has it all."""
    failed = [reason.removeprefix("pass: fails: ") for reason in reasons if ": holds:" not in reason] or list(reasons)
    shown = "; ".join(failed[:REASONS_SHOWN])
    return shown if len(shown) <= REASON_SHOWN else f"{shown[:REASON_SHOWN]}…"


def _smoke_row(group: str, parts: Sequence[tuple[str, Json]]) -> SmokeRow:
    reasons = []
    for key, part in parts:
        failed = [f"{check['name']}: {check['detail']}" for check in part["checks"] if check["ok"] is not True]
        if part["ok"] is not True:
            reasons.append(f"{key.removeprefix('smoke/')}: {_why(failed or ['failed'])}")
    return SmokeRow(group, sum(part["ok"] is True for _, part in parts), len(parts), reasons)


def tables(found: Conversations, worth: Worth) -> tuple[list[Table], list[str]]:
    """Points by category, conversations by group, and why some were lost."""
    calls = [
        [
            Cell(row.category),
            Cell(" ".join(f"{score}" for _, score, _ in row.scenarios)),
            Cell(f"{row.score}/{row.most}"),
        ]
        for row in found.tools
    ]
    if calls:
        calls.append([Cell("together"), NOTHING, Cell(f"{found.score}/{found.most}")])
    smoke = [[Cell(row.group), Cell(f"{row.passed}/{row.of}")] for row in found.smoke]
    said = [reason for category in found.tools for reason in category.reasons]
    said += [reason for group in found.smoke for reason in group.reasons]
    note = "Points of each scenario: 2 pass, 1 partly, 0 fail. Traces are in the result file."
    return [
        Table("tools", "Tool calls", columns("<category", "scenarios", "points"), calls, note),
        Table("smoke", "Conversations with known outcomes", columns("<group", "passed"), smoke),
    ], said


def overview(found: Conversations, worth: Worth) -> Cell:
    """Points and conversations, all together."""
    said = [f"{found.score} of {found.most} points for tool calls"] if found.tools else []
    if found.smoke:
        passed, of = sum(row.passed for row in found.smoke), sum(row.of for row in found.smoke)
        said.append(f"{passed} of {of} conversations as they should be")
    return Cell(", ".join(said) or "nothing was asked")


def published(found: Conversations) -> dict[str, Found]:
    """Sums; of fewer than all nothing is subtracted."""
    ours = {}
    if found.tools:
        ours["tools/total"] = _counted(found.score, found.most, POINTS)
    for row in found.smoke:
        ours[f"smoke/{row.group}"] = _counted(row.passed, row.of, SMOKE_SIZES.get(row.group, row.of))
    return ours


def _counted(value: int, of: int, whole: int) -> Found:
    return Found(value) if of == whole else Found(value, f"of {of}, not all were run", against=NOTHING)


def figures(found: Conversations) -> list[Figure]:
    """Points by category, of how many; conversations by group."""
    made = [Figure(row.category, "points for tool calls", row.score, f"of {row.most}") for row in found.tools]
    return made + [Figure(row.group, "conversations passed", row.passed, f"of {row.of}") for row in found.smoke]


def drawings(found: Conversations, worth: Worth) -> list[Drawing]:
    """None: the tables are short, and of whole points."""
    return []
