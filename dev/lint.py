"""Runs every static check on the files that it is for (`make lint`); reports all failures, then fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scripts.cli import parser_for
from v4forge import checkout
from v4forge.errors import UserError, run_main
from v4forge.outcomes import Outcome, failed, ok


def named(pattern: str) -> Callable[[Path, str], bool]:
    return lambda root, name: re.fullmatch(pattern, name) is not None


def is_shell(root: Path, name: str) -> bool:
    """Whether a file is a shell script, by its name or its first line."""
    if name.endswith(".sh"):
        return True
    with open(root / name, "rb") as file:
        return re.match(rb"#!\s*(/usr)?/bin/(env\s+)?(ba|da)?sh\b", file.readline(200)) is not None


@dataclass(frozen=True)
class Checker:
    """A command that fails on a bad file; the names of the files that it is for are put at its end, if it takes any."""

    name: str
    command: tuple[str, ...]
    takes: Callable[[Path, str], bool]
    stdin: str = ""
    with_names: bool = True


YAML = r".+\.ya?ml"
COMPOSE = r"(.+/)?compose[^/]*\.ya?ml"
WORKFLOW = r"\.github/workflows/.+\.ya?ml"
PYTHON = r".+\.py"

CHECKERS = (
    Checker("ruff check", ("ruff", "check", "--quiet"), named(PYTHON)),
    Checker("ruff format", ("ruff", "format", "--check", "--quiet"), named(PYTHON)),
    Checker("mypy", ("mypy", "--no-error-summary"), named(PYTHON), with_names=False),
    Checker("import-linter", ("lint-imports", "--no-cache", "--no-logo"), named(PYTHON), with_names=False),
    Checker("hadolint", ("hadolint", "--no-color"), named(r"(.+/)?Dockerfile(\.[^/]+)?")),
    # SC1091: a sourced file of the machine that the script runs on is not there to follow.
    Checker("shellcheck", ("shellcheck", "--exclude=SC1091"), is_shell),
    # Any document that parses fits the schema {}.
    Checker("yaml", ("check-jsonschema", "--schemafile", "-"), named(YAML), stdin="{}"),
    Checker("compose", ("check-jsonschema", "--builtin-schema", "vendor.compose-spec"), named(COMPOSE)),
    Checker("workflow", ("check-jsonschema", "--builtin-schema", "vendor.github-workflows"), named(WORKFLOW)),
    Checker(
        "workflow timeout",
        ("check-jsonschema", "--builtin-schema", "custom.github-workflows-require-timeout"),
        named(WORKFLOW),
    ),
)


@dataclass(frozen=True)
class Result:
    """What a checker said of its files."""

    outcome: Outcome
    files: int
    elapsed_s: float


def run(checker: Checker, root: Path, names: list[str]) -> Result:
    """The checker's verdict on its files among `names`; without any, it passes."""
    mine = [name for name in names if checker.takes(root, name)]
    if not mine:
        return Result(ok("", checker.name), 0, 0.0)
    started = time.monotonic()
    program = Path(sys.executable).with_name(checker.command[0])
    command = [str(program), *checker.command[1:], *(mine if checker.with_names else [])]
    try:
        done = subprocess.run(
            command, cwd=root, input=checker.stdin, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except FileNotFoundError:
        raise UserError(f"{program.name} is not installed beside {sys.executable}", "make env") from None
    judged = failed if done.returncode else ok
    return Result(judged(done.stdout, name=checker.name), len(mine), time.monotonic() - started)


def lint(root: Path) -> Iterator[Result]:
    """The results of all checkers on the checkout at `root`, in their order."""
    names = checkout.names(root)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda checker: run(checker, root, names), CHECKERS)


def main() -> None:
    parser_for("lint", __doc__).parse_args()
    faulty = []
    for result in lint(checkout.ROOT):
        found = result.outcome
        print(f"lint: {found.name:<16} {result.files:>4} files  {result.elapsed_s:5.1f} s  {found.status}", flush=True)
        if not found.ok:
            print(found.fact.rstrip(), flush=True)
            faulty.append(found.name)
    if faulty:
        raise UserError(
            f"lint found faults: {', '.join(faulty)} (above)", "correct them; .venv/bin/ruff format . reformats"
        )


if __name__ == "__main__":
    run_main(main)
