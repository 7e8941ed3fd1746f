"""Checks every tensor of an artifact: against what its config asks for and, with --source, against the upstream bytes.

Writes certificate.json into the artifact. Exit code 0 when every check passes, 1 when one fails.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scripts.cli import parser_for, steps
from v4forge import certificate
from v4forge.checkpoint import Checkpoint
from v4forge.errors import run_main
from v4forge.report import verdict
from v4forge.stamps import Digests


def main() -> int:
    parser = parser_for("verify", __doc__)
    parser.add_argument(
        "--artifact", type=Path, required=True, metavar="DIR", help="the folder to check; gets certificate.json"
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="the upstream checkpoint it was made from; without it only structure and statistics are checked",
    )
    parser.add_argument(
        "--expect",
        choices=tuple(certificate.METHODS),
        default="",
        help="how the routed experts must have been quantized; needs --source (default: all layers alike)",
    )
    arguments = parser.parse_args()
    if arguments.expect and not arguments.source:
        parser.error("argument --expect: only with --source can the two be told apart")
    with suppress(OSError):  # whatever ends this run early, no certificate of an earlier one remains
        (arguments.artifact / certificate.CERTIFICATE).unlink()
    artifact = Checkpoint(arguments.artifact, form="artifact")
    source = Checkpoint(arguments.source) if arguments.source else None
    digests = Digests(arguments.artifact.parent / ".stamps" / "digests.json")
    with steps("verify", len(certificate.CHECKS)) as advance:
        checks = certificate.verify(artifact, source, digests, advance, arguments.expect)
    result = certificate.write(arguments.artifact, checks, digests)
    digests.save()
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "detail"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, "[green]ok[/]" if check.ok else "[red]FAILED[/]", check.detail)
    Console().print(table)
    conclusion = verdict(result)
    print(conclusion.line)
    return 0 if conclusion.ok else 1


if __name__ == "__main__":
    run_main(main)
