"""How many requests have come whole and have no byte of an answer yet, in the metrics of a replica.

vLLM's own counts of requests come from its engine, with a step: an engine that hangs in the first step after a pause is
idle by them. docker/serve/watchdog.py reads this one. A request whose body is still on its way, or whose client does
not read, waits for no engine and is not counted.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import Gauge

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

REQUESTS = Gauge(
    "v4forge_requests_unanswered",
    "Requests that have come whole and have no byte of an answer",
    multiprocess_mode="livesum",
)


class Unanswered:
    """An ASGI middleware that counts them. A comment of a stream is no answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope.get("method") != "POST":
            await self.app(scope, receive, send)
            return
        whole = answered = False

        def answer() -> None:
            nonlocal answered
            if whole and not answered:
                REQUESTS.dec()
            answered = True

        async def receive_on() -> Message:
            nonlocal whole
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and not whole:
                whole = True
                if not answered:
                    REQUESTS.inc()
            return message

        async def send_on(message: Message) -> None:
            body = message.get("body", b"")
            if (body and not body.startswith(b":")) or (
                message["type"] != "http.response.start" and not message.get("more_body")
            ):
                answer()
            await send(message)

        try:
            await self.app(scope, receive_on, send_on)
        finally:
            answer()
