"""Says whether a folder is the artifact that was certified, and signs a certificate.

    python -m scripts.certified check DIR                   every byte once, then remembered
    python -m scripts.certified check DIR --check sizes     names and sizes alone
    python -m scripts.certified sign DIR --key sign.pem     certificate.sig.json, which --verify-key then asks for

What `make serve` asks before it starts, publish before it uploads, and Kubernetes' init containers; it needs neither
torch nor a GPU, and writes nothing into the artifact but the signature.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from v4forge import artifact_folder, certified
from v4forge.certified import CONTENTS, LEVELS
from v4forge.errors import UserError, report, run_main
from v4forge.units import decimal_size

from .cli import parser_for, say, steps


def add_options(command: argparse._ActionsContainer) -> None:
    """How closely an artifact is compared with its certificate; for every program that asks."""
    command.add_argument("--check", choices=LEVELS, default=CONTENTS,
        help="of the artifact: names and sizes, or each byte once for a folder; default: %(default)s")  # fmt: skip
    add_key(command)


def add_key(command: argparse._ActionsContainer) -> None:
    """The key that has to have signed."""
    command.add_argument(
        "--verify-key", type=Path, metavar="FILE", help="public key that must have signed the certificate"
    )


def bytes_of(artifact: Path) -> tuple[int, int]:
    """How many files were certified, and how many bytes they have."""
    listed = artifact_folder.entries(artifact)
    return len(listed), sum((artifact / name).stat().st_size for name in listed)


def check(arguments: argparse.Namespace) -> int:
    """Exit code 0 for the artifact that was certified."""
    artifact: Path = arguments.artifact
    if not artifact.is_dir():
        raise UserError(f"{artifact} does not exist", "pass the folder of an artifact")
    again = f"python -m scripts.verify --artifact {artifact}, then copy it again"
    found = certified.check(artifact, again, arguments.check, arguments.verify_key, steps, arguments.memory)
    count, size = bytes_of(artifact)
    by = "by content" if arguments.check == CONTENTS else "by name and size"
    signed = f", signed by {arguments.verify_key}" if arguments.verify_key else ""
    say(f"certified: {count} files, {decimal_size(size)}, {by}{signed}; {found.fact}")
    return 0


def sums_only(artifact: Path, key: Path | None) -> int:
    """Compares every byte with what was certified, and names all that differ. Exit code 0 where nothing does."""
    found = artifact_folder.certificate_state(artifact)
    if found.verdict not in ("ok", "changed"):
        raise UserError(found.fact, f"python -m scripts.verify --artifact {artifact}")
    if key:
        certified.check_signature(artifact, key)
    changes = certified.all_changes(artifact, steps)
    for change in changes:
        report(UserError(change.fact, "copy or download it again") if "--sums-only" in change.hint else change)
    if changes:
        say(f"sums: FAILED, {len(changes)} differences from what was certified")
        return 1
    count, size = bytes_of(artifact)
    say(f"sums: ok, {count} files, {decimal_size(size)}, each byte as it was certified")
    return 0


def sign(arguments: argparse.Namespace) -> int:
    """Writes the signature beside the certificate."""
    say(f"signed: {certified.sign(arguments.artifact, arguments.key)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for("certified", __doc__)
    commands = parser.add_subparsers(required=True, metavar="check|sign")
    for name, run in {"check": check, "sign": sign}.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.add_argument("artifact", type=Path, metavar="DIR", help="the folder of an artifact")
        command.set_defaults(run=run)
    add_options(commands.choices["check"])
    commands.choices["check"].add_argument(
        "--memory", type=Path, metavar="FILE", help="where digests are remembered; default: beside the artifact"
    )
    commands.choices["sign"].add_argument("--key", type=Path, required=True, metavar="FILE", help="private key, PEM")
    arguments = parser.parse_args(argv)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    run_main(main)
