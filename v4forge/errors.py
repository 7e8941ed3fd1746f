"""The one error that a user is meant to read: a fact, and the command or step that gets past it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user can act on. `fact` names the tensor, file or setting; `hint` says what to run or do."""

    def __init__(self, fact: str, hint: str) -> None:
        super().__init__(fact, hint)
        self.fact = fact
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.fact} (hint: {self.hint})"


def report(error: UserError) -> None:
    """Prints the two lines on stderr."""
    print(f"error: {error.fact}\nhint: {error.hint}", file=sys.stderr, flush=True)


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a program's `main` and exits: with what it returns (None is 0), 1 for a UserError, 130 when interrupted.

    Any other exception is a defect of ours and keeps its traceback.
    """
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
    sys.exit(code)
