"""What routing is worth to prefix caches: conversations through a router, before stand-ins of replicas that keep what
they have read.

    python -m benchmarks.routing --out benchmarks/results/routing
    python -m benchmarks.routing --out … --beside "vllm-router --host 127.0.0.1 --port {port} --worker-urls {urls}"

The router of `make serve` in its two ways, to the replica with the fewest requests and to the conversation's own;
--beside adds another router. A stand-in reads those characters of a prompt that it does not have yet, one prompt after
the other, at a rate, takes its time to write, and beyond a capacity forgets what was used longest ago. --out gets a
.json: by router the share of the prompts' characters that were kept, seconds to the answer's first token, and the
requests of the most loaded replica beside the mean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import shutil
import subprocess
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, TypeVar

import httpx
import torch

from benchmarks.machine import machine
from v4forge.errors import UserError, run_main
from v4forge.files import write_json
from v4forge.serving import haproxy
from v4forge.serving.haproxy import Addresses, Limits

L = TypeVar("L")
BLOCK, READ_PER_S, STARTS_S = 256, 40_000, 60.0
# To write an answer, and until the next question.
WRITE_S, THINK_S = (0.1, 0.5), (0.2, 1.0)


@dataclass(frozen=True)
class Load:
    """`conversations` of so many `turns`, `at_once` of them at a time; characters of the `system` prompt that all
    share, of a `question` and of an `answer`; `capacity`: characters that a replica keeps."""

    replicas: int = 4
    conversations: int = 96
    turns: int = 6
    at_once: int = 48
    system: int = 4096
    question: int = 2048
    answer: int = 1024
    capacity: int = 400_000


@dataclass
class Replica:
    """A stand-in for one replica. `read` and `kept` count the characters of its prompts, `asked` its requests."""

    port: int
    capacity: int
    read: int = 0
    kept: int = 0
    asked: int = 0
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)
    reads: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", self.port, limit=2**20)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = next((line for line in head.splitlines() if line.startswith("content-length:")), ":0")
                body = await reader.readexactly(int(length.partition(":")[2]))
                asked = head.startswith("post /v1/chat/completions ")
                content = await self._answered(json.loads(body)) if asked else b"{}"
                status = b"200 OK" if asked or head.startswith("get") else b"404 Not Found"
                writer.write(b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n" % status)
                writer.write(b"Content-Length: %d\r\n\r\n" % len(content) + content)
                await writer.drain()
        writer.close()

    async def _answered(self, asked: dict[str, Any]) -> bytes:
        prompt = "".join(message["content"] for message in asked["messages"])
        self.asked += 1
        async with self.reads:
            new = self.reads_anew(prompt)
            self.kept += len(prompt) - new
            self.read += new
            await asyncio.sleep(new / READ_PER_S)
        await asyncio.sleep(asked["write_s"])
        return b'{"choices": [{"message": {"role": "assistant", "content": ""}}]}'

    def reads_anew(self, prompt: str) -> int:
        """Characters of a prompt after what is kept of its beginning; all of it is kept from now on."""
        names = [hash(prompt[:end]) for end in range(BLOCK, len(prompt) + 1, BLOCK)]
        known = next((place for place, name in enumerate(names) if name not in self.blocks), len(names))
        for name in names:
            self.blocks[name] = None
            self.blocks.move_to_end(name)
        while len(self.blocks) > self.capacity // BLOCK:
            self.blocks.popitem(last=False)
        return len(prompt) - known * BLOCK


async def talk(client: httpx.AsyncClient, number: int, load: Load, waits: asyncio.Semaphore) -> list[float]:
    """A conversation, turn by turn -> seconds until each answer, without the time to write it."""
    messages = [{"role": "system", "content": "s" * load.system}]
    elapsed_s, chance = [], random.Random(number)
    async with waits:
        for turn in range(load.turns):
            messages.append({"role": "user", "content": f"{number} {turn} ".ljust(load.question, "q")})
            write_s = chance.uniform(*WRITE_S)
            asked = {"model": "m", "messages": messages, "write_s": write_s}
            begun = time.monotonic()
            answer = await client.post("/v1/chat/completions", json=asked)
            answer.raise_for_status()
            elapsed_s.append(time.monotonic() - begun - write_s)
            await asyncio.sleep(chance.uniform(*THINK_S))
            messages.append({"role": "assistant", "content": f"{number} {turn} ".ljust(load.answer, "a")})
    return elapsed_s


async def measured(command: str, first: int, load: Load) -> dict[str, Any]:
    """The load through the router that a command starts on the port `first`, before replicas from first + 2 on."""
    replicas = [Replica(first + 2 + number, load.capacity) for number in range(load.replicas)]
    servers = [await replica.listen() for replica in replicas]
    try:
        async with routed(command, first, 120) as client:
            for replica in replicas:
                replica.read = replica.kept = replica.asked = 0
            waits = asyncio.Semaphore(load.at_once)
            begun = time.monotonic()
            talks = await asyncio.gather(*(talk(client, number, load, waits) for number in range(load.conversations)))
            elapsed_s = time.monotonic() - begun
    finally:
        for server in servers:
            server.close()
    first_byte = quantiles([each for one in talks for each in one], n=100)
    return {
        "kept": sum(replica.kept for replica in replicas) / sum(replica.kept + replica.read for replica in replicas),
        "to_first_token_s": {"p50": first_byte[49], "p90": first_byte[89], "p99": first_byte[98]},
        "elapsed_s": elapsed_s,
        "requests": [replica.asked for replica in replicas],
        "most_of_mean": max(replica.asked for replica in replicas) / mean(replica.asked for replica in replicas),
    }


async def answers(asker: httpx.AsyncClient) -> bool:
    """Whether a stand-in answers through a router."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "are you there?"}], "write_s": 0}
    return (await asker.post("/v1/chat/completions", json=asked)).status_code == 200


@asynccontextmanager
async def routed(
    command: str, port: int, limit_s: float, ready: Callable[[httpx.AsyncClient], Awaitable[bool]] = answers
) -> AsyncIterator[httpx.AsyncClient]:
    """A client, who waits `limit_s` for an answer, of the router that a command starts on `port`, when it is ready; it
    ends with the context. Raises UserError where it does not serve."""
    process = subprocess.Popen(shlex.split(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_S
        async with httpx.AsyncClient(base_url=url, timeout=limit_s, limits=limits) as asker:
            serves = False
            while not serves:
                if time.monotonic() > end or process.poll() is not None:
                    raise UserError(f"no router serves: {command}", "run the command by itself")
                with suppress(httpx.HTTPError, KeyError, ValueError):
                    serves = await ready(asker)
                if not serves:
                    await asyncio.sleep(0.2)
            yield asker
    finally:
        process.terminate()
        process.wait()


def command_of(folder: Path, port: int, replicas: Sequence[str], by_prefix: bool) -> str:
    """The command of the router of `make serve` on `port` and the one after it, before these addresses."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if program is None:
        raise UserError("haproxy, the router, is not installed", "apt-get install haproxy")
    addresses = Addresses(f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}", replicas)
    file = folder / f"haproxy-{by_prefix:d}.cfg"
    file.write_text(haproxy.configuration(addresses, 30, Limits(), by_prefix), encoding="utf-8")
    return shlex.join([program, "-db", "-f", str(file)])


def run(load: Load, first: int, beside: Sequence[str]) -> dict[str, Any]:
    """Every router under the same load."""
    results = {}
    replicas = [f"127.0.0.1:{first + 2 + number}" for number in range(load.replicas)]
    with tempfile.TemporaryDirectory() as folder:
        for name, by_prefix in (("fewest requests", False), ("by prefix", True)):
            command = command_of(Path(folder), first, replicas, by_prefix)
            results[name] = asyncio.run(measured(command, first, load))
    urls = " ".join(f"http://{replica}" for replica in replicas)
    for template in beside:
        results[template] = asyncio.run(measured(template.format(port=first, urls=urls), first, load))
    return results


def parser_of(program: str, doc: str | None, load: Any) -> argparse.ArgumentParser:
    """The options of a benchmark of routers; each figure of `load`, a dataclass, is one."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="without its ending")
    parser.add_argument("--beside", action="append", default=[], metavar="COMMAND", help="with {port} and {urls}")
    parser.add_argument("--port", type=int, default=18100, metavar="N", help="and those after it")
    for name, value in asdict(load).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, metavar="N")
    return parser


def load_of(kind: type[L], arguments: argparse.Namespace) -> L:
    """The load that the options describe."""
    return kind(**{each.name: getattr(arguments, each.name) for each in fields(kind)})  # type: ignore[arg-type]


def write(out: Path, load: Any, results: Mapping[str, Any]) -> None:
    """Leaves the figures of each router in a .json."""
    write_json(out.with_suffix(".json"), {**machine(torch.device("cpu")), "load": asdict(load), "routers": results})


def main() -> None:
    arguments = parser_of("benchmarks.routing", __doc__, Load()).parse_args()
    load = load_of(Load, arguments)
    results = run(load, arguments.port, arguments.beside)
    for name, row in results.items():
        seconds = ", ".join(f"{name} {value:.2f} s" for name, value in row["to_first_token_s"].items())
        print(f"{row['kept']:6.1%} kept, {seconds}, {row['most_of_mean']:.2f} of the mean: {name}")
    write(arguments.out, load, results)


if __name__ == "__main__":
    run_main(main)
