"""A stage's program as a process of its run: it holds the run's lock, ends with the run, and its end is explained."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from v4forge import children, launched
from v4forge.errors import UserError


def execute(command: Sequence[str], root: Path, lock: int, environment: Mapping[str, str]) -> int:
    """Runs a program to its end and returns its exit code. It inherits the lock, so that no second run can start
    while it lives, and our SIGTERM, which it also gets when we are killed; Ctrl-C reaches it by itself, through the
    terminal."""
    environment = {**launched.without(), **environment, "PYTHONPATH": str(root)}
    begin = children.ending_with_us()
    with subprocess.Popen(command, pass_fds=(lock,), env=environment, preexec_fn=begin) as program:
        previous = signal.signal(signal.SIGTERM, lambda *_: program.terminate())
        try:
            code = program.wait()
        except KeyboardInterrupt:
            program.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    return code if code >= 0 else 128 - code


def killed(name: str, number: int) -> UserError:
    """The error of a stage whose program a signal has ended."""
    try:
        by = signal.Signals(number).name
    except ValueError:
        by = f"signal {number}"
    why = "sudo dmesg | tail says whether memory ran out; then the same command again"
    return UserError(f"{name} was ended by {by}", why)
