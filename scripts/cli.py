"""What the programs share on the command line: the parser's form and progress with an ETA."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_S = 10.0  # without a terminal, a line at most this often


def parser_for(stage: str, doc: str | None, **options: object) -> argparse.ArgumentParser:
    """The parser of `python -m scripts.<stage>`, described by the program's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m scripts.{stage}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,  # type: ignore[arg-type]
    )


@contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Progress over `total` steps on stderr: call the value with (steps finished, what is being done).

    A bar with an ETA on a terminal; elsewhere a line every ten seconds, with the same facts.
    """
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda finished, doing: bar.update(task, completed=finished, description=f"{what}: {doing}")
        return
    started = said = time.monotonic()

    def line(finished: int, doing: str) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= QUIET_S:
            said = now
            eta = f", {(now - started) / finished * (total - finished):.0f} s left" if finished else ""
            print(f"{what}: {finished}/{total} done, {doing}{eta}", file=sys.stderr, flush=True)

    yield line
