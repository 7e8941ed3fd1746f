"""What the outside may tell a process of its place among the ranks of a run: torchrun may, and nobody else.

A pod, a batch system or a shell that ran something else leaves the same variables. They are ignored, with a line, and
what we start does not get them.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from v4forge.errors import UserError

MARK = "TORCHELASTIC_RUN_ID"  # torchrun sets it for each process that it starts
NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}  # and their least
OURS = re.compile(r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_\w+")
TELLING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
INTERFACE = "GLOO_SOCKET_IFNAME"
START = "torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node <N> -m scripts.calibrate …"


@dataclass(frozen=True)
class Place:
    """A process's place among those of a run, and where they meet."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int

    @property
    def all_here(self) -> bool:
        """Whether every rank runs on this machine."""
        return self.local_size == self.size


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun gave this process, None where torchrun did not start it. Raises UserError for a place
    that cannot be."""
    if not environment.get(MARK):
        return None
    found = {}
    for name, least in NUMBERS.items():
        value = environment.get(name, "")
        if not re.fullmatch(r"\d{1,9}", value) or int(value) < least:
            what = f"{name}={value} is no number that torchrun gives" if value else f"{name} is not set"
            raise UserError(f"{MARK} is set, but {what}", f"unset {MARK}, or start the ranks together: {START}")
        found[name] = int(value)
    address = environment.get("MASTER_ADDR", "")
    if found["RANK"] >= found["WORLD_SIZE"] or not address:
        what = (
            f"RANK={found['RANK']} is none of WORLD_SIZE={found['WORLD_SIZE']}" if address else "MASTER_ADDR is not set"
        )
        raise UserError(f"{MARK} is set, but {what}", f"unset {MARK}, or start the ranks together: {START}")
    return Place(
        found["RANK"],
        found["WORLD_SIZE"],
        found["LOCAL_RANK"],
        found["LOCAL_WORLD_SIZE"],
        address,
        found["MASTER_PORT"],
    )


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's number among the ranks; 0 where it runs alone."""
    value = environment.get("RANK", "") if environment.get(MARK) else ""
    return int(value) if re.fullmatch(r"\d{1,9}", value) else 0


def ignored(environment: Mapping[str, str] = os.environ) -> str:
    """A line about variables of ranks that something else than torchrun has set; "" where there is none."""
    if environment.get(MARK):
        return ""
    found = [f"{name}={environment[name]}" for name in TELLING if environment.get(name)]
    return f"{' '.join(found)}: not of torchrun, ignored; one process runs. Several: {START}" if found else ""


def without(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for what we start: without any place among ranks, and without torchrun's own settings."""
    return {name: value for name, value in environment.items() if not OURS.fullmatch(name)}


def check_interface(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError where the network interface that gloo is to use is not here."""
    named, here = environment.get(INTERFACE, ""), [name for _, name in socket.if_nameindex()]
    if absent := [name for name in named.split(",") if name and name not in here]:
        raise UserError(f"{INTERFACE}={named}: there is no {absent[0]}, but {', '.join(here)}", f"unset {INTERFACE}")


def resolves(address: str) -> bool:
    """Whether a host's name leads to an address."""
    try:
        return bool(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError):
        return False
