"""What CI runs (`make ci`): the parts below, each `make <part>`, and in the end what each took beside its budget.

Tests, servers and images run beside each other, as servers and images wait often: for a disk, a daemon, the end of a
stall. Images need the least of the cores, so the pages' commands follow them: all three rows end at about one time.
What a part says is kept in scratch/ci/<part>.log and shown whole when it ends. A part that fails keeps no other from
running. Budgets are `[tool.v4forge.ci]` in pyproject.toml, for 2 cores: what is over one is marked and fails nothing,
since seconds on a shared machine are noise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from scripts.cli import parser_for, say
from v4forge import checkout, files
from v4forge.errors import UserError, run_main

LOGS = Path("scratch/ci")  # below the checkout
# Parts of one row follow each other, rows run beside each other.
Rows = Sequence[Sequence[str]]
ROWS: Rows = (("lint", "lock-check", "test"), ("env-serve-cpu", "test-serve"), ("test-images", "docs-check", "docs"))
# Seconds that .ci/run has spent before, NAME=SECONDS a word: packages, the docker daemon, the environment.
BEFORE = "V4FORGE_CI_BEFORE"


def parts(rows: Rows = ROWS) -> list[str]:
    return [part for row in rows for part in row]


@dataclass(frozen=True)
class Took:
    """How a part ended, and after how many seconds."""

    part: str
    seconds: float
    code: int = 0


@dataclass
class Runs:
    """The parts of one run of CI at `root`. A stop ends those that run."""

    root: Path
    took: list[Took] = field(default_factory=list)
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _speaking: Lock = field(default_factory=Lock)
    _stopped: bool = False

    def all(self, rows: Rows) -> list[Took]:
        """Runs every part -> how each ended, in the order of their ends."""
        with ThreadPoolExecutor(len(rows)) as pool:
            try:
                list(pool.map(self._row, rows))
            finally:
                self.stop()  # before the pool waits for its threads
        return self.took

    def stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            process.terminate()

    def _row(self, row: Iterable[str]) -> None:
        for part in row:
            if not self._stopped:
                self._part(part)

    def _part(self, part: str) -> None:
        log = self.root / LOGS / f"{part}.log"
        files.make_folder(log.parent)
        started = time.monotonic()
        with open(log, "wb") as file:
            process = subprocess.Popen(
                ["make", part], cwd=self.root, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
            )
        self._running.add(process)
        if self._stopped:  # in between
            process.terminate()
        self._say(f"ci: {part}: runs; its log is {log.relative_to(self.root)}")
        code = process.wait()
        self._running.discard(process)
        ended = Took(part, time.monotonic() - started, code)
        self.took.append(ended)
        state = f"FAILED with exit code {code}" if code else "ok"
        said = log.read_text(encoding="utf-8", errors="replace").rstrip()
        self._say(f"\nci: {part}: {state} after {ended.seconds:.0f} s; it said:\n{said}\n")

    def _say(self, text: str) -> None:
        with self._speaking:
            say(text)


def budgets(root: Path) -> dict[str, float]:
    """Part -> seconds that pyproject.toml states for it."""
    content = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return {part: float(seconds) for part, seconds in content["tool"]["v4forge"]["ci"]["budget_s"].items()}


def before(words: str) -> list[Took]:
    """What .ci/run has measured, in its words."""
    pairs = (word.partition("=") for word in words.split())
    return [Took(part, float(seconds)) for part, _, seconds in pairs]


def table(took: Sequence[Took], whole_s: float, budget_s: Mapping[str, float]) -> list[str]:
    """Seconds by part beside the budget. Parts that run beside each other make the whole less than their sum."""
    rows = [*took, Took("whole", whole_s)]
    lines = [f"{'ci':<14} {'seconds':>8} {'budget':>8}"]
    for row in rows:
        stated = budget_s.get(row.part)
        shown = "" if stated is None else f"{stated:.0f}"
        marks = [*(["FAILED"] if row.code else []), *(["over"] if stated is not None and row.seconds > stated else [])]
        lines.append(f"{row.part:<14} {row.seconds:>8.0f} {shown:>8}  {', '.join(marks)}".rstrip())
    return lines


def main(argv: Sequence[str] | None = None, root: Path = checkout.ROOT, rows: Rows = ROWS) -> None:
    parser_for("ci", __doc__).parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the parts end with it
    started, earlier = time.monotonic(), before(os.environ.pop(BEFORE, ""))
    took = Runs(root).all(rows)
    whole_s = time.monotonic() - started + sum(each.seconds for each in earlier)
    ordered = sorted(took, key=lambda each: parts(rows).index(each.part))
    say("\n".join(table([*earlier, *ordered], whole_s, budgets(root))))
    if failed := [each.part for each in ordered if each.code]:
        raise UserError(f"CI failed: {', '.join(failed)} (above)", f"make {failed[0]}")


if __name__ == "__main__":
    run_main(main)
