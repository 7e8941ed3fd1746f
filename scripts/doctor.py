"""Says what can go wrong on this machine before a run begins, and the command that gets past it.

    python -m scripts.doctor --work scratch/flash --profile flash --gpus 8

GPUs, containers, disk, system, network. Exit code 1 when a check failed. Without GPUs and docker it says so, which
fails nothing of PROFILE=tiny.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from v4forge.errors import run_main
from v4forge.model import hub_rows
from v4forge.outcomes import FAILED, OK, WARNING, Outcome
from v4forge.pipeline.doctor import checks
from v4forge.pipeline.doctor.host import Host
from v4forge.pipeline.stages import PROFILES

from .cli import QUIET_S, parser_for, table_console

FILE_WIDTH = 160  # of the table where there is no terminal
COLOURS = {OK: "green", WARNING: "yellow", FAILED: "bold red"}
GROUPS = {check.name: check.group for check in checks.CHECKS}


def shown(rows: Sequence[Outcome]) -> Table:
    """A row a check, under its group; those that say the same are one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", max_width=20)
    table.add_column("found", overflow="fold")
    for group, members in groupby(rows, key=lambda row: GROUPS[row.name]):
        table.add_section()
        table.add_row("", Text(group, style="bold"), "")
        same: dict[tuple[str, str], list[str]] = {}
        for row in members:
            same.setdefault((row.status, row.fact), []).append(row.name)
        for (status, fact), names in same.items():
            table.add_row(Text(status, style=COLOURS[status]), ", ".join(names), Text(fact))
    return table


def fixes(rows: Sequence[Outcome]) -> list[Text]:
    """The commands that help, each once and on a line of its own to be copied, below the checks that it is for."""
    same: dict[str, list[Outcome]] = {}
    for row in sorted(rows, key=lambda row: row.status != FAILED):
        if row.fix:
            same.setdefault(row.fix, []).append(row)
    lines: list[Text] = []
    for fix, helped in same.items():
        status = helped[0].status
        names = [row.name for row in helped if row.status == status]
        more = f", and {len(helped) - len(names)} more" if len(helped) > len(names) else ""
        lines += [Text(f"{status}: {', '.join(names)}{more}", style=COLOURS[status]), Text(f"    {fix}", style="cyan")]
    return lines


@contextmanager
def waiting(total: int) -> Iterator[Callable[[int, str], None]]:
    """What is being waited for, on stderr: one line that changes on a terminal, else one every ten seconds."""
    console = Console(stderr=True)
    said = time.monotonic()

    def line(finished: int, doing: str) -> None:
        nonlocal said
        text = f"doctor: {finished} of {total} checks, waiting for {doing}"
        if console.is_terminal:
            status.update(text[: console.width - 3])
        elif time.monotonic() - said >= QUIET_S:
            said = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    with console.status("doctor") as status:
        yield line


def main() -> int:
    parser = parser_for("doctor", __doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="the run's folder, <scratch>/<profile>")
    parser.add_argument("--profile", choices=sorted(PROFILES), default="tiny", help="default: %(default)s")
    parser.add_argument(
        "--gpus", type=int, default=1, metavar="N", help="that share the samples (default: %(default)s)"
    )
    parser.add_argument("--runtime", choices=("", "host", "docker"), default="", help="default: the profile's")
    parser.add_argument("--source", type=Path, metavar="DIR", help="an upstream checkpoint that is here")
    parser.add_argument("--corpus", metavar="FILE", help=f"a calibration text that is here, or {hub_rows.FORM}")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="default: the profile's")
    parser.add_argument("--seq-len", type=int, default=0, metavar="N", help="default: the profile's")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    args = parser.parse_args()
    if args.gpus < 1 or min(args.samples, args.seq_len) < 0:
        parser.error("--gpus, --samples and --seq-len are at least 1")
    text = hub_rows.named(args.corpus) if args.corpus else None
    host = Host(
        work=args.work.absolute(),
        profile=args.profile,
        gpus_wanted=args.gpus,
        runtime=args.runtime,
        source=args.source.absolute() if args.source else None,
        corpus=text.absolute() if isinstance(text, Path) else None,
        data_set=text.argument if isinstance(text, hub_rows.DataSet) else "",
        samples=args.samples,
        seq_len=args.seq_len,
    )
    with waiting(len(checks.CHECKS)) as progress:
        outcomes = checks.run(host, progress=progress)
    rows = [checks.told(outcome) for outcome in outcomes]
    if args.json:
        print(json.dumps({"checks": [row.record() for row in rows]}, indent=1))
    else:
        console = table_console(FILE_WIDTH)
        console.print(shown(rows))
        for line in fixes(rows):
            console.print(line, soft_wrap=True)
        print()
        print(checks.verdict(host, outcomes))
    return int(not all(outcome.ok for outcome in outcomes))


if __name__ == "__main__":
    run_main(main)
