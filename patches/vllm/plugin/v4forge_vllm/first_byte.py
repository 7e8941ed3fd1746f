"""An ASGI middleware for `vllm serve --middleware`: an answer begins with its first byte of content, not before.

vLLM sends the head of a streamed answer when it takes a request, and the first token when there is one, which may be
much later. A router can give a request to another replica as long as nothing of the answer has arrived; with this, that
is until the first token. A whole answer comes as before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class FirstByte:
    """Holds back the head of every HTTP answer until its body has something in it, or ends."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: list[Message] = []

        async def send_later(message: Message) -> None:
            if message["type"] == "http.response.start":
                held.append(message)
                return
            if held and (message.get("body") or not message.get("more_body", False)):
                await send(held.pop())
            if not held:
                await send(message)

        await self.app(scope, receive, send_later)
