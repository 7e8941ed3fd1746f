"""Processes that end with the one that started them, however that ends: also by SIGKILL, or when memory runs out."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def ending_with_us(number: int = signal.SIGTERM) -> Callable[[], None]:
    """For subprocess.Popen's preexec_fn: the kernel sends the process this signal once the thread that started it has
    ended (prctl(2))."""
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def begin() -> None:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it has ended before
            os.kill(os.getpid(), number)

    return begin
