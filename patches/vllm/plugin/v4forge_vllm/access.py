"""Who gets in: an ASGI middleware for `vllm serve --middleware` before everything that a replica answers.

vLLM asks for a key below a few beginnings of paths and answers some fifty others to anybody, among them /invocations,
which completes, and /tokenize. Here a path that is not served is a 404, whichever way a request comes: by the router,
its address for this machine, the replica's own port or a Service of Kubernetes. Without API_KEY_FILE no key is asked
for.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from v4forge_vllm import usage
from v4forge_vllm.first_byte import FirstByte
from v4forge_vllm.keep_alive import SILENCE_S, KeepAlive
from v4forge_vllm.keys import Key, Keys, UnreadableError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# Without a key: what asks whether a replica lives, and what Prometheus reads.
OPEN = frozenset({"/health", "/metrics"})
SERVED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/responses",
        "/version",
    }
)
NOBODY = "-"  # in the metrics, whose request it is that shows no key; no key is called so
FILE, REPLICAS = "API_KEY_FILE", "REPLICAS"


class RefusedError(Exception):
    """A request that gets an error of `status` instead of an answer."""

    def __init__(self, status: int, message: str, name: str = NOBODY, retry_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.name = name
        self.retry_s = retry_s


class Access:
    """Lets requests in by path, key and rate, counts them, and hands them on to FirstByte, KeepAlive and vLLM."""

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.app = FirstByte(KeepAlive(app, silence_s))
        self.keys = Keys(file, clock) if (file := os.environ.get(FILE, "")) else None
        self.share = 1 / int(os.environ.get(REPLICAS, "1"))
        self.clock = clock
        self.buckets: dict[str, Bucket] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":  # none is served
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            name = self._name(scope)
        except RefusedError as refused:
            usage.REQUESTS.labels(refused.name, str(refused.status)).inc()
            await refuse(send, refused)
            return
        await usage.count(self.app, name, scope, receive, send)

    def _name(self, scope: Message) -> str:
        """Whose request it is, by its key. Raises RefusedError for one that does not get in."""
        if scope["path"] not in SERVED:
            raise RefusedError(404, "nothing is served here")
        if self.keys is None or scope["method"] == "OPTIONS":  # what a browser asks first, without a key
            return NOBODY
        try:
            key = self.keys.owner(bearer(scope))
        except UnreadableError:
            raise RefusedError(503, "the API keys cannot be read") from None
        if key is None:
            raise RefusedError(401, "there is no such API key")
        if key.limit and scope["method"] == "POST":
            self._draw(key)
        return key.name

    def _draw(self, key: Key) -> None:
        a_second = key.limit * self.share / 60
        bucket = self.buckets.get(key.name)
        if bucket is None or bucket.a_second != a_second:
            bucket = self.buckets[key.name] = Bucket(a_second, self.clock())
        if wait_s := bucket.draw(self.clock()):
            message = f"more than {key.limit} requests a minute"
            raise RefusedError(429, message, key.name, retry_s=math.ceil(wait_s))


class Bucket:
    """A token bucket that holds a minute's requests, at least one."""

    def __init__(self, a_second: float, now_s: float) -> None:
        self.a_second = a_second
        self.size = max(60 * a_second, 1.0)
        self.left = self.size
        self.at_s = now_s

    def draw(self, now_s: float) -> float:
        """0 where a request may run, else the seconds until one may."""
        self.left = min(self.left + (now_s - self.at_s) * self.a_second, self.size)
        self.at_s = now_s
        if self.left < 1:
            return (1 - self.left) / self.a_second
        self.left -= 1
        return 0.0


def bearer(scope: Message) -> bytes:
    """The key that a request carries, empty where it carries none."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.partition(b" ")
            return bytes(key.strip()) if scheme.lower() == b"bearer" else b""
    return b""


async def refuse(send: Send, refused: RefusedError) -> None:
    """An error in the form of OpenAI's, as the router's are."""
    error = {"message": str(refused), "type": "access", "code": refused.status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.retry_s:
        headers.append((b"retry-after", str(refused.retry_s).encode()))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
