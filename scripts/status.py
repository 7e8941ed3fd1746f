"""Shows a whole run from another terminal: its stages, how fast they go, and when all of it will be done.

    python -m scripts.status --work scratch/flash --watch

Reads logs/events.jsonl of the work folder. Exit code 1 where nothing has run there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from v4forge.errors import UserError, run_main
from v4forge.pipeline import events, run_state
from v4forge.pipeline.run_state import StageView, WholeRun
from v4forge.units import duration, pace

from .cli import parser_for, table_console

REFRESH_S = 1.0
COLOURS = {
    run_state.RUNNING: "cyan",
    run_state.DONE: "green",
    run_state.FAILED: "red",
    run_state.INTERRUPTED: "yellow",
    run_state.DIED: "red",
}


def current(work: Path) -> WholeRun:
    """The last run in a work folder as it is now. Raises UserError where there was none."""
    history = events.read(events.file_of(work))
    found = run_state.view(history, time.time(), lambda stages: run_state.lives(work, stages))
    if not found:
        profile = "" if work.name == "tiny" else f" PROFILE={work.name}"
        raise UserError(f"nothing has run in {work} yet", "make demo" if not profile else f"make artifact{profile}")
    return found


def stage_table(run: WholeRun, console: Console) -> Table:
    """A row a stage; without memory or rate where they do not fit."""
    names = list(COLUMNS)
    for left_out in (None, "peak memory", "rate"):
        names = [name for name in names if name != left_out]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("stage", no_wrap=True)
        table.add_column("", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for each in run.stages:
            where = Text(_where(each), style=COLOURS.get(each.state, "dim"))
            table.add_row(each.stage, where, *(COLUMNS[name](each) for name in names))
        if not console.is_terminal or console.measure(table).maximum <= console.width:
            break
    return table


def _where(each: StageView) -> str:
    if each.total is None or each.state in run_state.OVER:
        return each.state
    return f"{each.state} {each.done:,}/{each.total:,} {each.unit}".rstrip()


def _left(each: StageView) -> str:
    if each.state == run_state.RUNNING and each.eta_s is not None:
        return duration(each.eta_s)
    if each.state not in (run_state.WAITING, run_state.RUNNING):
        return ""
    if each.estimate_s is None:
        return "unknown"
    return f"~ {duration(max(0.0, each.estimate_s - (each.elapsed_s or 0)))}"


COLUMNS: dict[str, Callable[[StageView], str]] = {
    "time": lambda each: "" if each.elapsed_s is None else duration(each.elapsed_s),
    "rate": lambda each: pace(each.rate, each.unit) if each.rate and each.state == run_state.RUNNING else "",
    "left": _left,
    "peak memory": lambda each: str(each.peak) if each.peak_host_bytes else "",
}


def conclusion(run: WholeRun, now: float) -> list[str]:
    """The last lines: when all will be done, or how the run has ended and how it goes on."""
    name = run.title or "the run"
    took = duration(run.elapsed_s)
    if run.running:
        ends = datetime.fromtimestamp(now + run.eta_s).strftime("%H:%M:%S")
        if run.unknown:
            left = f"at least {duration(run.eta_s)} left" if run.eta_s else "what is left is not known"
            return [f"{name}: {took} so far, {left}; nobody has measured {', '.join(run.unknown)}"]
        return [f"{name}: {took} so far, {duration(run.eta_s)} left, done at {ends}"]
    if run.state == run_state.DONE:
        return [f"{name}: done in {took}"]
    failed = next((each for each in run.stages if each.state == run_state.FAILED), None)
    if run.state == run_state.DIED:
        said = f"{name}: its process {run.pid} is gone without a word, {took} after its start"
    elif run.state == run_state.INTERRUPTED:
        said = f"{name}: stopped after {took}"
    else:
        said = f"{name}: failed after {took}" + (f" in {failed.stage}" if failed else "")
    why = [f"  {failed.fact}"] if failed and failed.fact else []
    return [said, *why, f"what is finished is kept; it goes on with: {run.command}"]


def shown(run: WholeRun, console: Console) -> Group:
    """All of it, as wide as the console."""
    now = time.time()
    begun = datetime.fromtimestamp(run.started_at).strftime("%Y-%m-%d %H:%M:%S")
    head = [Text(run.command, style="dim"), Text(f"since {begun}", style="dim")]
    return Group(*head, stage_table(run, console), *(Text(line) for line in conclusion(run, now)))


def as_json(run: WholeRun, now: float) -> str:
    """The same for programs; times in seconds, memory in bytes."""
    finish = now + run.eta_s if run.running and not run.unknown else None
    return json.dumps({**asdict(run), "finish_at": finish}, indent=1)


def main() -> int:
    parser = parser_for("status", __doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="the run's folder: scratch/<profile>")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print it as JSON")
    how.add_argument("--watch", action="store_true", help="keep it on the screen until the run ends")
    arguments = parser.parse_args()
    run = current(arguments.work)
    console = table_console()
    if arguments.json:
        print(as_json(run, time.time()))
    elif arguments.watch and console.is_terminal:
        with Live(shown(run, console), console=console, refresh_per_second=4) as live:
            while run.running:
                time.sleep(REFRESH_S)
                run = current(arguments.work)
                live.update(shown(run, console))
    else:
        while arguments.watch and run.running:
            time.sleep(REFRESH_S)
            run = current(arguments.work)
        console.print(shown(run, console))
    return 0


if __name__ == "__main__":
    run_main(main)
