"""What the programs share on the command line: the parser's form, tables, and progress with rate, ETA and memory.

A program imports what takes seconds, such as torch, once its arguments are parsed, within `main` or what `main` calls:
--help and a mistake in an argument are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from v4forge.errors import Parser, UserError
from v4forge.hints import as_called
from v4forge.pipeline import events
from v4forge.pipeline.progress import Moment, Pace

DEVICE = "default: cuda where there is a GPU, else cpu"  # help of --device
QUIET_S = 10.0  # without a terminal, a line at most this often
TOLD_S = 1.0  # an event of progress at most this often
BAR_WIDTHS = range(10, 31)
FILE_WIDTH = 400  # of tables where there is no terminal: nothing is wrapped
# What a narrow terminal shows last and leaves out first.
DISPENSABLE = ("memory", "doing", "rate")

_on_screen = threading.Lock()  # held by the stage that has the bar: there is one


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows a docstring as it is written, and programs as they are called."""

    def _expand_help(self, action: argparse.Action) -> str:
        return as_called(super()._expand_help(action))


def parser_for(stage: str, doc: str | None, **options: object) -> Parser:
    """The parser of `python -m scripts.<stage>`, described by the program's docstring."""
    return Parser(
        prog=as_called(f"python -m scripts.{stage}"),
        description=as_called(doc or ""),
        formatter_class=Formatter,
        **options,
    )


def pair(form: str) -> Callable[[str], tuple[str, str]]:
    """The type of an option such as ARG=VALUE, which `form` calls it by."""

    def parsed(text: str) -> tuple[str, str]:
        name, equals, value = text.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
        return name, value

    return parsed


def say(line: str) -> None:
    print(line, flush=True)


def table_console(file_width: int = FILE_WIDTH) -> Console:
    """Where tables go: as wide as the terminal; `file_width` where there is none."""
    console = Console()
    if not console.is_terminal:
        console.width = file_width
    return console


def some_device() -> str:
    """What --device is by default."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def steps(what: str, total: int, unit: str = "", resumes: bool = False) -> Iterator[Callable[[int, str], None]]:
    """Progress over `total` steps on stderr: call the value, from any thread, with (steps finished, what comes next).

    On a terminal a bar, and one line that stays; elsewhere a line every ten seconds, and a last one where it took
    longer than that. The same facts go to the run's events, under the name of the stage that the program runs as, which
    is what the line says too. Rate and ETA are by the steps of this run: those that are
    finished when it first says so do not count. `resumes`: whether the same command goes on where this one is stopped,
    which is what Ctrl-C then says.
    """
    follow = _Follow(Pace(os.environ.get(events.STAGE) or what, total, unit))
    follow.tell("start")
    try:
        with follow.shown():
            yield follow.advance
    except KeyboardInterrupt:
        follow.tell("interrupted")
        print(follow.pace.moment().stopped(resumes), file=sys.stderr, flush=True)
        raise
    except BaseException as error:
        follow.tell("failed", fact=error.fact if isinstance(error, UserError) else repr(error))
        raise
    follow.pace.end()
    follow.tell("end")
    last = follow.pace.moment()
    if last.begun is not None and (follow.on_terminal or last.elapsed_s >= QUIET_S):
        print(last.ended(), file=sys.stderr, flush=True)


class _Follow:
    """One stage's progress on its way to the screen, the log and the events."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.on_terminal = sys.stderr.isatty()
        self._has_bar = False
        self._said = self._told = time.monotonic()
        self._lock = threading.Lock()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The bar, where there is a terminal that no other stage has one on."""
        with ExitStack() as held:
            if self.on_terminal and _on_screen.acquire(blocking=False):
                held.callback(_on_screen.release)
                self._has_bar = True
                console = Console(stderr=True)
                # What the program prints meanwhile appears above the bar.
                live = Live(get_renderable=lambda: bar(self.pace.moment(), console.width), console=console)
                live.transient = True
                held.enter_context(live)
            yield

    def advance(self, finished: int, doing: str) -> None:
        self.pace.advance(finished, doing)
        now = time.monotonic()
        with self._lock:
            tell, say = now - self._told >= TOLD_S, not self._has_bar and now - self._said >= QUIET_S
            self._told = now if tell else self._told
            self._said = now if say else self._said
        if tell:
            self.tell("progress")
        if say:
            print(self.pace.moment().line(), file=sys.stderr, flush=True)

    def tell(self, event: str, **more: object) -> None:
        events.emit(event, self.pace.what, **self.pace.moment().facts(), **more)


def bar(moment: Moment, width: int) -> Table:
    """A line of at most `width` columns: what, a bar, how far, how fast, how long; less where that is too long."""
    parts = dict(moment.parts())
    for name in ("", *DISPENSABLE):
        parts.pop(name, None)
        words = "  ".join(text for text in parts.values() if text)
        room = width - len(moment.what) - len(words) - 4
        if room >= BAR_WIDTHS.start:
            break
    table = Table.grid(padding=(0, 2))
    pieces: list[Text | ProgressBar] = [Text(moment.what), Text(words, no_wrap=True, overflow="ellipsis")]
    if room >= BAR_WIDTHS.start:
        size = min(room, BAR_WIDTHS.stop)
        pieces.insert(1, ProgressBar(total=max(1, moment.total), completed=moment.done, width=size))
    table.add_row(*pieces)
    return table
