"""The artifact beside a baseline, another checkpoint served and measured alike: `make bench BASELINE=<folder>`.

What differs beyond noise is decided by bench/comparison.py, as for `make compare`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from v4forge.bench.comparison import Comparison, Delta, compare, verdict
from v4forge.bench.results import Result
from v4forge.reporting.benches import Told
from v4forge.reporting.tables import NONE, Cell, Table, columns, p_value

SHOWN = 24  # figures that are not folded away
OF_ITSELF = "target.artifact"  # what two checkpoints differ in anyway


@dataclass(frozen=True)
class Beside:
    """What a page says of it. `said`: the verdict, what else differs, why to be careful."""

    title: str
    verdict: str
    said: list[str]
    table: Table

    @property
    def folded(self) -> bool:
        return len(self.table.rows) > SHOWN


def name(told: Told) -> str:
    """Of the baseline: its folder's name, and its digest where it has one."""
    artifact = told.result["target"].get("artifact") or {}
    folder = Path(str(artifact.get("folder") or ""))
    called = folder.parent.name if folder.name == "artifact" else folder.name
    digest = artifact.get("sums_sha256") or artifact.get("config_sha256")
    return f"{called or 'not known'} ({str(digest)[:12]}…)" if digest else called or "not known"


def beside(ours: Mapping[str, Told], baseline: Mapping[str, Told]) -> Beside | None:
    """None where no bench was run on both, with a part in common."""
    shared = [bench for bench in ours if bench in baseline and _parts(ours[bench]) & _parts(baseline[bench])]
    if not shared:
        return None
    a, b = (
        {bench: Result(Path(side), dict(each[bench].result)) for bench in shared}
        for side, each in (("A", baseline), ("B", ours))
    )
    found = compare(a, b)
    names = list(dict.fromkeys(name(baseline[each.bench]) for each in found))
    said = verdict(found, "the baseline", "this artifact")
    return Beside(
        f"Beside the baseline, {', '.join(names)}",
        said,
        [*_differing(found), *_warnings(found)],
        table(found),
    )


def _parts(told: Told) -> set[str]:
    return set(told.result["parts"])


def _differing(found: Sequence[Comparison]) -> list[str]:
    lines = []
    for each in found:
        other = [what for what, _, _ in each.settings if not what.startswith(OF_ITSELF)]
        if other:
            lines.append(f"{each.bench}: not measured alike, but for the checkpoint: {', '.join(other)}")
    return lines


def _warnings(found: Sequence[Comparison]) -> list[str]:
    sides = (
        ("A: ", "baseline: "),
        ("B: ", "this artifact: "),
        ("A is", "the baseline is"),
        ("B is", "this artifact is"),
    )
    lines = []
    for each in found:
        for warning in each.warnings:
            for side, called in sides:
                if warning.startswith(side):
                    warning = called + warning.removeprefix(side)
            lines.append(f"{each.bench}: {warning}")
    return lines


def table(found: Sequence[Comparison]) -> Table:
    """A row a figure, below a heading for each bench."""
    rows: list[list[Cell]] = []
    for each in found:
        rows.append([Cell(each.bench)])
        rows += [_row(delta) for delta in each.deltas]
    note = (
        "The difference is this artifact minus the baseline, with its 95% interval; what is called beyond noise is so "
        "with all figures together (Holm)."
    )
    heads = columns("<", "baseline", "this artifact", "difference")
    return Table("baseline", "This artifact beside the baseline", heads, rows, note)


def _row(delta: Delta) -> list[Cell]:
    percent = "%" if delta.unit == "%" else ""
    values = [Cell(f"{value:,.2f}{percent}") for value in (delta.a, delta.b)]
    if delta.change is None:
        return [Cell(delta.metric, delta.note), *values, NONE]
    digits, unit = (1, "%") if delta.relative else (2, " points" if percent else f" {delta.unit}")
    mark = ("good" if delta.better else "bad") if delta.beyond_noise else ""
    ends = "" if delta.low is None or delta.high is None else f"{delta.low:+.{digits}f} to {delta.high:+.{digits}f}"
    beyond = "beyond noise" if delta.beyond_noise else ""
    note = "; ".join(part for part in (ends, "" if delta.p is None else p_value(delta.p), beyond) if part)
    return [Cell(delta.metric, delta.note), *values, Cell(f"{delta.change:+.{digits}f}{unit}", note, mark)]
