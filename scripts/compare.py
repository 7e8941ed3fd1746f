"""Compares two runs of the benches, figure by figure, and says which differences are beyond noise, in one line first.

    python -m scripts.compare A B [--json]

A and B are folders of reports, the newest result of each bench in them is taken, or one result file each. Differences
are B minus A, with 95% intervals and two-sided p; what is called beyond noise is so with all figures together (Holm).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from v4forge.bench import results
from v4forge.bench.comparison import READERS, Comparison, Delta, compare, verdict
from v4forge.bench.results import Result
from v4forge.errors import UserError, run_main
from v4forge.files import understood
from v4forge.reporting.tables import p_value

from .cli import parser_for

if TYPE_CHECKING:
    from v4forge.bench.comparison import Comparison, Delta

SETTING_SHOWN = 60  # characters of it


def found(path: Path) -> dict[str, Result]:
    """bench -> result, in a folder of reports, or of one file. Raises UserError where there is none."""
    if not path.exists():
        raise UserError(f"{path} does not exist", "make compare A=<reports folder or result file> B=<the other>")
    if path.is_file():
        result = results.load(path, READERS)
        return {result.bench: result}
    folder = path if results.newest(path, READERS) else path / "reports"
    measured = results.newest(folder, READERS)
    if not measured:
        raise UserError(f"{path} holds no result of a bench", "make bench, or pass the folder with <bench>-<time>.json")
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for("compare", __doc__)
    parser.add_argument("a", type=Path, metavar="A", help="a folder of reports, or a result file")
    parser.add_argument("b", type=Path, metavar="B", help="the one to compare with it")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(argv)

    one, other = found(args.a), found(args.b)
    shared = [bench for bench in one if bench in other]
    # Each bench once by itself, so that a file of another form is named.
    for bench in shared:
        for each in (one[bench], other[bench]):
            alone = partial(compare, {bench: each}, {bench: each})
            understood(each.path, results.again(each.path, bench), alone)
    compared = compare(one, other)
    if args.json:
        print(json.dumps([each.json() for each in compared], indent=1))
        return 0
    console = Console(highlight=False)
    console.print(f"verdict: {verdict(compared)}", markup=False, style="bold", soft_wrap=True)
    for comparison in compared:
        show(comparison, console)
    conclude(compared, console)
    return 0


def show(each: Comparison, console: Console) -> None:
    """One bench: where the runs differ, warnings, figures."""
    console.print(f"[bold]{each.bench}[/]\n  A {escape(each.a)}\n  B {escape(each.b)}", soft_wrap=True)
    for what, one, other in each.settings:
        console.print(
            f"  {escape(what)}: {escape(_short(one))} -> {escape(_short(other))}", style="dim", soft_wrap=True
        )
    for warning in each.warnings:
        console.print(f"  warning: {escape(warning)}", style="yellow", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("", overflow="fold")
    for heading in ("A", "B", "B - A", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for delta in each.deltas:
        style = ("green" if delta.better else "red") if delta.beyond_noise else ""
        p = "" if delta.p is None else p_value(delta.p).removeprefix("p ").removeprefix("= ")
        name = delta.metric + (f" ({delta.note})" if delta.note else "")
        table.add_row(escape(name), f"{delta.a:,.2f}", f"{delta.b:,.2f}", _change(delta), p, style=style)
    console.print(table)


def _change(delta: Delta) -> str:
    if delta.change is None:
        return "–"
    digits, unit = (1, "%") if delta.relative else (2, "")
    change, low, high = (None if x is None else f"{x:+.{digits}f}" for x in (delta.change, delta.low, delta.high))
    return f"{change}{unit}" + (f" ({low} to {high})" if low and high else "")


def _short(text: str) -> str:
    return text if len(text) <= SETTING_SHOWN else f"{text[:SETTING_SHOWN]}…"


def conclude(compared: Sequence[Comparison], console: Console) -> None:
    """The last lines: what is beyond noise."""
    deltas = [delta for each in compared for delta in each.deltas]
    tested = sum(delta.p is not None for delta in deltas)
    beyond = [delta for delta in deltas if delta.beyond_noise]
    console.print(f"beyond noise: {len(beyond)} of {tested} tested figures", markup=False)
    for delta in beyond:
        word, style = ("better", "green") if delta.better else ("worse", "red")
        console.print(f"  {word}: {delta.metric} {_change(delta)}", markup=False, style=style, soft_wrap=True)


if __name__ == "__main__":
    run_main(main)
