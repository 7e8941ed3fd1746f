"""The running router, by the commands of haproxy's socket: which replicas get requests, and how many they have."""

from __future__ import annotations

import csv
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from v4forge.errors import UserError
from v4forge.serving.deployment import CONTROL, Deployment

ANSWER_S = 10.0
PIECE = 1 << 16
RELOAD_S, POLL_S = 20.0, 0.1
SERVERS = "show stat replicas 4 -1"  # of the backend of that name what is a server


@dataclass(frozen=True)
class Server:
    """A replica as the router has it: `serves` where it gets requests that ask for no replica, `requests` it has."""

    serves: bool
    requests: int


def servers(deployment: Deployment) -> list[Server]:
    """The replicas, first to last."""
    rows = {row["svname"]: row for row in csv.DictReader(told(deployment, SERVERS).lstrip("# ").splitlines())}
    return [
        Server(row["status"].startswith("UP") and row["weight"] != "0", int(row["scur"]))
        for row in (rows[name] for name in deployment.names)
    ]


def take_out(deployment: Deployment, number: int) -> None:
    """From now on a replica gets nothing but what asks for it, also from a router that is started anew."""
    deployment.write_router(out=[number])
    _weigh(deployment, number, 0)


def put_back(deployment: Deployment, number: int) -> None:
    deployment.write_router()
    _weigh(deployment, number, 1)


def _weigh(deployment: Deployment, number: int, weight: int) -> None:
    name = deployment.names[number]
    if said := told(deployment, f"set weight replicas/{name} {weight}").strip():
        raise UserError(f"the router does not give {name} the weight {weight}: {said}", "make serve-stop, make serve")


@contextmanager
def reloading(deployment: Deployment) -> Iterator[None]:
    """Around what has the router read its configuration and certificate anew: ends when it is the one that answers.
    Raises UserError where it goes on as before, as it does with what it cannot read."""
    before = _process(deployment)
    yield
    end = time.monotonic() + RELOAD_S
    while time.monotonic() < end:
        with suppress(UserError):  # between the two
            if _process(deployment) != before:
                return
        time.sleep(POLL_S)
    raise UserError(
        "the router could not read its new configuration and goes on with the one before", "make serve-logs"
    )


def _process(deployment: Deployment) -> str:
    rows = dict(line.split(": ", 1) for line in told(deployment, "show info").splitlines() if ": " in line)
    return rows.get("Pid", "")


def told(deployment: Deployment, command: str) -> str:
    """What the router answers. Raises UserError where it does not."""
    path = Path(deployment.folder) / CONTROL
    text = b""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(ANSWER_S)
                connection.connect(f"/proc/self/fd/{folder}/{path.name}")  # its own path may be too long for a socket
                connection.sendall(f"{command}\n".encode())
                while piece := connection.recv(PIECE):
                    text += piece
        finally:
            os.close(folder)
    except OSError as error:
        fact = f"the router takes no commands ({error.strerror or 'no answer'}): it does not run, or is an older one"
        raise UserError(fact, "make serve-status; make serve-stop, make serve") from None
    return text.decode()
