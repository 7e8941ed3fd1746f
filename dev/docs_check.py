"""Runs every command of README.md and docs/ in a copy of the checkout, and says which one no longer works.

    python -m dev.docs_check                 all pages
    python -m dev.docs_check docs/images.md  one
    python -m dev.docs_check --list          how each would be treated

What needs GPUs, docker, a network or hours is run dry, or its target and options are looked up: the table is RULES in
dev/doc_commands.py. A command that no rule covers fails. Exit code 1 when one failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dev import doc_commands
from dev.doc_runs import Outcome, Runs, copied
from scripts.cli import parser_for
from v4forge import checkout
from v4forge.errors import UserError, run_main


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for("docs_check", __doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="pages (default: README.md, docs/*.md)")
    parser.add_argument("--list", action="store_true", help="say how each command is treated, and stop")
    args = parser.parse_args(argv)
    pages = [path.absolute() for path in args.files] or doc_commands.pages(checkout.ROOT)
    texts = {_name(path): _read(path) for path in pages}
    if args.list:
        listed(texts)
        return 0
    started = time.monotonic()
    with copied(checkout.ROOT) as copy:
        outcomes = [told(outcome) for outcome in Runs(copy).pages(texts)]
    failed = [outcome for outcome in outcomes if outcome.fault]
    for outcome in failed:
        print(f"\n{outcome.line()}\n    $ {outcome.step.run}\n    " + outcome.fault.replace("\n", "\n    "))
    counts = Counter(outcome.step.how for outcome in outcomes)
    print(
        f"\ndocs-check: {len(outcomes)} commands of {len(texts)} pages:"
        f" {', '.join(f'{count} {how}' for how, count in counts.most_common())}; {time.monotonic() - started:.0f} s",
        flush=True,
    )
    if failed:
        pages_of = sorted({outcome.step.command.page for outcome in failed})
        raise UserError(
            f"{len(failed)} commands failed", f"correct them, then: python -m dev.docs_check {' '.join(pages_of)}"
        )
    return 0


def told(outcome: Outcome) -> Outcome:
    print(outcome.line(), flush=True)
    return outcome


def listed(texts: dict[str, str]) -> None:
    for page, text in texts.items():
        for command in doc_commands.commands(page, text):
            for step in doc_commands.steps(command):
                why = f" ({step.rule.why})" if step.rule and step.rule.why else ""
                print(f"{page}:{command.line}  {command.text}\n    {step.how}{why}: {step.run}")


def _name(path: Path) -> str:
    return str(path.relative_to(checkout.ROOT)) if path.is_relative_to(checkout.ROOT) else str(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "python -m dev.docs_check --help") from None


if __name__ == "__main__":
    run_main(main)
