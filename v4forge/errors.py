"""The one error that a user is meant to read: a fact, and the command or step that gets past it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

EVENTS = "V4FORGE_EVENTS"  # of a run: names a file in its folder of logs
# Packages whose errors are of the other side.
OUTSIDE = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub", "docker")
SUMMARY_LENGTH = 400


class UserError(Exception):
    """Something the user can act on. `fact` names the tensor, file or setting; `hint` says what to run or do, and
    becomes what that is here (hints.py)."""

    def __init__(self, fact: str, hint: str) -> None:
        with contextlib.suppress(ImportError):  # an image's build has env.py and errors.py alone
            from v4forge import hints

            fact, hint = hints.as_called(fact), hints.told(hint)
        super().__init__(fact, hint)
        self.fact = fact
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.fact} (hint: {self.hint})"


def report(error: UserError) -> None:
    """Prints the two lines on stderr."""
    print(f"error: {error.fact}\nhint: {error.hint}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Parses a program's words: a wrong one ends the program with the two lines, exit code 2, not with its usage. The
    description is shown as it is written."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | settings)

    def error(self, message: str) -> NoReturn:
        report(UserError(message.removeprefix("argument "), f"{self.prog} --help"))
        sys.exit(2)


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a program's `main` and exits: with what it returns (None is 0), 1 for a UserError, 130 when interrupted.

    What the system, the network or a daemon refuses, unforeseen, is one line and a file with the traceback.
    Any other exception is a defect of ours and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is no reason to end
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main() or 0
    except UserError as error:
        report(error)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # who read our output, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception as error:
        if not is_outside(error) or (kept := keep_traceback(error)) is None:
            raise
        report(UserError(summary(error), f"cat {shlex.quote(str(kept))} shows where; then the same command again"))
        code = 1
    sys.exit(code)


def interrupts_in_one_line() -> None:
    """From now on Ctrl-C is a line also where `run_main` does not catch it, as while a program's modules load."""
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("\nstopped", file=sys.stderr, flush=True)
        else:
            shown(kind, error, trace)

    sys.excepthook = hook


def is_outside(error: BaseException) -> bool:
    """Whether an error comes from outside: the system, the network, a daemon."""
    kinds = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | MemoryError) or not kinds.isdisjoint(OUTSIDE)


def summary(error: BaseException) -> str:
    """An error in one line, without names and passwords in addresses."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename!s}: {error.strerror}"
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return re.sub(r"(?<=://)[^/\s@]+@", "…@", " ".join(text.split()))[:SUMMARY_LENGTH]


def keep_traceback(error: BaseException) -> Path | None:
    """Writes the traceback into the run's folder of logs, or where else it can -> the file; None where nowhere."""
    events = os.environ.get(EVENTS)
    program = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else "program"
    name = f"{program}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.traceback"
    text = "".join(traceback.format_exception(error))
    for folder in ([Path(events).parent] if events else []) + [Path("scratch", "logs"), Path("/tmp/v4forge-logs")]:
        with contextlib.suppress(OSError, ValueError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            return folder / name
    return None
