"""Says whether what is here is one release: tree, locks, images, artifact, certificate, reports and card.

    python -m scripts.release_check --work scratch/flash

Each check says what it found, or what is wrong and the command that corrects it. Exit code 1 when one failed. What was
not measured fails nothing, and is said; the registry of images.lock is asked what it has.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from v4forge.errors import run_main
from v4forge.outcomes import OK, Outcome

from . import certified
from .cli import parser_for, steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for("release_check", __doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="scratch/<profile>")
    certified.add_key(parser)
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    args = parser.parse_args(argv)

    from v4forge.pipeline import release_check

    with steps("release-check", len(release_check.CHECKS), "checks") as advance:
        rows = release_check.rows(release_check.Release(args.work, key=args.verify_key), advance)
    failed = [row for row in rows if not row.ok]
    if args.json:
        print(json.dumps({"checks": [row.record() for row in rows]}, indent=1))
    else:
        Console().print(shown(rows))
        print(f"release-check: {f'{len(failed)} of {len(rows)} checks FAILED' if failed else 'ok'}")
    return int(bool(failed))


def shown(rows: Sequence[Outcome]) -> Table:
    """A row a check; what corrects one stands below what is wrong."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found", overflow="fold")
    for row in rows:
        found = Text(row.fact)
        if row.fix:
            found.append(f"\nfix: {row.fix}", style="cyan")
        table.add_row(Text(row.status, style="green" if row.status == OK else "bold red"), row.name, found)
    return table


if __name__ == "__main__":
    run_main(main)
