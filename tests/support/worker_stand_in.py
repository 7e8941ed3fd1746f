"""Stands in for a vLLM behind the router, token by token: what it does when a client leaves, when it stalls, and when a
request ends it.

A request is JSON: `stream`, `tokens`, `first_s` and `token_s` until the first token and between two, and `kills`: None,
"before" or "after" the first token. A worker that was killed has reset every connection and refuses new ones.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close that resets


@dataclass
class Worker:
    """`seen` are the bodies it got; `running` how many it computes; `status` what it answers instead; `health` what it
    answers to checks, with its name."""

    port: int
    status: int = 200
    health: int = 200
    name: str = ""
    host: str = "127.0.0.1"
    seen: list[bytes] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    running: int = 0
    killed: bool = False

    def __post_init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.connections: set[asyncio.StreamWriter] = set()
        self.server: asyncio.Server | None = None

    @contextmanager
    def run(self) -> Iterator[Worker]:
        thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        thread.start()
        self.restart()
        try:
            yield self
        finally:
            self.loop.call_soon_threadsafe(self._end)
            time.sleep(0.05)
            self.loop.call_soon_threadsafe(self.loop.stop)
            thread.join(20)

    def restart(self) -> None:
        """Begins to listen, as after a start."""

        async def listen() -> None:
            self.server = await asyncio.start_server(self._connected, self.host, self.port)

        self.killed = False
        asyncio.run_coroutine_threadsafe(listen(), self.loop).result(10)

    def stall(self, stalled_s: float) -> None:
        """Does nothing at all for so long; the kernel goes on taking connections."""
        self.loop.call_soon_threadsafe(time.sleep, stalled_s)

    def kill(self) -> None:
        self.loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self.killed = True
        if self.server is not None:
            self.server.close()
        for writer in list(self.connections):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
        self.connections.discard(writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            running = f'vllm:num_requests_running{{model_name="{self.name}"}} {self.running}\n'
            text = running if head.startswith("GET /metrics ") else self.name
            writer.write(answer(self.health, text.encode()))
            await writer.drain()
            return
        lengths = [line for line in head.splitlines() if line.lower().startswith("content-length:")]
        body = await reader.readexactly(int(lengths[0].split(":")[1]))
        self.seen.append(body)
        self.heads.append(head)
        left = asyncio.ensure_future(reader.read())  # ends when the client does
        work = asyncio.ensure_future(self._compute(json.loads(body or b"{}"), writer))
        self.running += 1
        await asyncio.wait([left, work], return_when=asyncio.FIRST_COMPLETED)
        self.running -= 1
        for task in (left, work):
            task.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await task

    async def _compute(self, asked: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if self.status != 200:
            writer.write(answer(self.status, b"{}"))
            await writer.drain()
            return
        await asyncio.sleep(asked.get("first_s", 0))
        if asked.get("kills") == "before":
            self._end()
            return
        text = b""
        for number in range(asked.get("tokens", 1)):
            await asyncio.sleep(asked.get("token_s", 0) if number else 0)
            text += (event := b'data: {"n": %d}\n\n' % number)
            if asked.get("stream"):
                writer.write((b"" if number else answer(200, None)) + chunk(event))
                await writer.drain()
            if asked.get("kills") == "after":
                self._end()
                return
        writer.write(chunk(b"data: [DONE]\n\n") + chunk(b"") if asked.get("stream") else answer(200, text))
        await writer.drain()


def answer(status: int, body: bytes | None) -> bytes:
    """A whole answer, or the head of one in chunks."""
    kind = "Transfer-Encoding: chunked\r\nContent-Type: text/event-stream" if body is None else ""
    length = kind or f"Content-Length: {len(body or b'')}"
    return f"HTTP/1.1 {status} x\r\n{length}\r\nConnection: close\r\n\r\n".encode() + (body or b"")


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)
