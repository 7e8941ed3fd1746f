"""What a router makes of a replica that ends, and of a request that ends whatever computes it: before stand-ins.

    python -m benchmarks.routing_faults --out benchmarks/results/routing-faults
    python -m benchmarks.routing_faults --out … --beside "vllm-router --port {port} --worker-urls {urls}"

Clients ask on and on, not streamed, so that no answer has begun until it is whole. After a while one replica resets its
connections and refuses new ones, and comes back; then one request ends the replica that gets it, and the next. --out
gets a .json: by router the requests that were answered and lost in each of the two, the longest wait for an answer, how
many of the lost were sent in vain after the replica had gone, and how many replicas the one request has ended.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.routing import Replica, command_of, load_of, parser_of, routed, write
from v4forge.errors import run_main

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close that resets
WRITE_S, POISON = (0.2, 1.0), "poison"


@dataclass(frozen=True)
class Load:
    """`clients` that ask on and on; a fault after `fault_s`, the replica is back `away_s` later, the end `rest_s` after
    that."""

    replicas: int = 4
    clients: int = 24
    fault_s: int = 4
    away_s: int = 8
    rest_s: int = 6


@dataclass
class Mortal(Replica):
    """A stand-in that can end: as a killed process it resets its connections and refuses others for `away_s`."""

    away_s: float = 0.0
    ended: int = 0
    server: asyncio.Server | None = None
    writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self) -> None:
        self.server = await self.listen()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        await super()._connected(reader, writer)
        self.writers.discard(writer)

    async def _answered(self, asked: dict[str, Any]) -> bytes:
        if POISON in asked["messages"][-1]["content"]:
            self.end()
        return await super()._answered(asked)

    def end(self) -> None:
        assert self.server is not None
        self.ended += 1
        self.server.close()
        for writer in self.writers:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()
        asyncio.get_running_loop().call_later(self.away_s, lambda: asyncio.ensure_future(self.start()))


@dataclass
class Crowd:
    """`became` of each request: "answered", or its status or error; `late` those lost whose replica had gone before."""

    asker: httpx.AsyncClient
    gone_s: float = float("inf")
    became: Counter[str] = field(default_factory=Counter)
    late: int = 0
    longest_s: float = 0.0
    over: bool = False

    async def ask(self, content: str, write_s: float = 0.0) -> None:
        asked = {"model": "m", "messages": [{"role": "user", "content": content}], "write_s": write_s}
        begun = time.monotonic()
        try:
            status = (await self.asker.post("/v1/chat/completions", json=asked)).status_code
            end = "answered" if status == 200 else str(status)
        except httpx.HTTPError as error:
            end = type(error).__name__
        self.became[end] += 1
        self.late += end != "answered" and begun > self.gone_s
        self.longest_s = max(self.longest_s, time.monotonic() - begun)

    async def client(self, number: int) -> None:
        chance, turn = random.Random(number), 0
        while not self.over:
            await self.ask(f"{number} {turn}", chance.uniform(*WRITE_S))
            turn += 1

    def figures(self) -> dict[str, Any]:
        answered = self.became.pop("answered", 0)
        return {
            "answered": answered,
            "lost": dict(self.became),
            "lost_that_came_after_the_end": self.late,
            "longest_s": self.longest_s,
        }


async def one_ends(asker: httpx.AsyncClient, replicas: Sequence[Mortal], load: Load) -> dict[str, Any]:
    """A replica ends beside the crowd."""
    crowd = Crowd(asker)
    clients = [asyncio.ensure_future(crowd.client(number)) for number in range(load.clients)]
    await asyncio.sleep(load.fault_s)
    crowd.gone_s = time.monotonic()
    replicas[0].end()
    await asyncio.sleep(load.away_s)
    before = replicas[0].asked
    await asyncio.sleep(load.rest_s)
    crowd.over = True
    await asyncio.gather(*clients)
    return crowd.figures() | {"requests_of_the_one_that_is_back": replicas[0].asked - before}


async def one_poisons(asker: httpx.AsyncClient, replicas: Sequence[Mortal], load: Load) -> dict[str, Any]:
    """A request that ends replicas comes beside the crowd."""
    crowd, other = Crowd(asker), Crowd(asker)
    ended = sum(replica.ended for replica in replicas)
    clients = [asyncio.ensure_future(crowd.client(number)) for number in range(load.clients)]
    await asyncio.sleep(load.fault_s)
    crowd.gone_s = time.monotonic()
    await other.ask(POISON)
    await asyncio.sleep(load.away_s + load.rest_s)
    crowd.over = True
    await asyncio.gather(*clients)
    return crowd.figures() | {"replicas_ended": sum(replica.ended for replica in replicas) - ended}


async def measured(command: str, first: int, load: Load) -> dict[str, Any]:
    """Both faults behind the router that a command starts on the port `first`, before replicas from first + 2 on."""
    replicas = [Mortal(first + 2 + number, 0, away_s=load.away_s) for number in range(load.replicas)]
    for replica in replicas:
        await replica.start()
    try:
        async with routed(command, first, 60) as asker:
            return {
                "a replica ends": await one_ends(asker, replicas, load),
                "a request ends replicas": await one_poisons(asker, replicas, load),
            }
    finally:
        for replica in replicas:
            if replica.server is not None:
                replica.server.close()


def run(load: Load, first: int, beside: Sequence[str]) -> dict[str, Any]:
    """Every router before the same faults: that of `make serve`, and those beside it."""
    replicas = [f"127.0.0.1:{first + 2 + number}" for number in range(load.replicas)]
    urls = " ".join(f"http://{replica}" for replica in replicas)
    with tempfile.TemporaryDirectory() as folder:
        commands = {"make serve": command_of(Path(folder), first, replicas, by_prefix=True)}
        commands |= {each: each.format(port=first, urls=urls) for each in beside}
        return {name: asyncio.run(measured(command, first, load)) for name, command in commands.items()}


def main() -> None:
    arguments = parser_of("benchmarks.routing_faults", __doc__, Load()).parse_args()
    load = load_of(Load, arguments)
    results = run(load, arguments.port, arguments.beside)
    for name, faults in results.items():
        print(name)
        for fault, row in faults.items():
            figures = (f"{key.replace('_', ' ')} {value}" for key, value in row.items())
            print(f"  {fault}: {', '.join(figures)}")
    write(arguments.out, load, results)


if __name__ == "__main__":
    run_main(main)
