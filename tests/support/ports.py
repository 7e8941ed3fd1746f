"""Ports that nobody listens on, for what a test starts."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack
from itertools import count

# Below those that the system gives to whoever asks for any. Each process begins elsewhere, and gives none twice.
FIRST, LAST = 12000, 32000
_places = count(random.Random(os.getpid()).randrange(LAST - FIRST))


def free_port() -> int:
    return free_ports(1)


def free_ports(number: int) -> int:
    """The first of so many free ports in a row."""
    for _ in range(LAST - FIRST):
        places = [next(_places) for _ in range(number)]
        first = FIRST + places[0] % (LAST - FIRST - number)
        try:
            with ExitStack() as bound:
                for port in range(first, first + number):
                    bound.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")
