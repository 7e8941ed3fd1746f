"""An ASGI middleware for `vllm serve --middleware`: an answer begins with its first byte of content, not before.

vLLM sends the head of a streamed answer when it takes a request, and the first token when there is one, which may be
much later. A router can give a request to another replica as long as nothing of the answer has arrived; with this, that
is until the first token. Where the engine dies before, vLLM streams its error under the head of a success: that comes
with the error's status, on which a router asks another replica too. A whole answer comes as before.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from v4forge_vllm.unanswered import Unanswered

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class FirstByte:
    """Holds back the head of every HTTP answer until its body has something in it, or ends; counts those."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = Unanswered(app)

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held: list[Message] = []
        failed = False

        async def send_later(message: Message) -> None:
            nonlocal failed
            if message["type"] == "http.response.start":
                held.append(message)
                return
            if held and (message.get("body") or not message.get("more_body", False)):
                head = held.pop()
                if failed := (error := streamed_error(head, message.get("body", b""))) is not None:
                    await fail(send, error)
                else:
                    await send(head)
            if not held and not failed:
                await send(message)

        await self.app(scope, receive, send_later)


def streamed_error(head: Message, body: bytes) -> dict[str, Any] | None:
    """The error that a stream begins with; None where it begins with something else, or is no stream."""
    if head["status"] != 200 or not body.startswith(b"data: {"):
        return None
    try:
        event = json.loads(body.partition(b"\n\n")[0].removeprefix(b"data: "))
    except ValueError:
        return None
    return event if isinstance(event.get("error"), dict) else None


async def fail(send: Send, event: dict[str, Any]) -> None:
    """An answer that is an error, as vLLM's are that do not stream."""
    body = json.dumps(event).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(event["error"].get("code") or 500), "headers": headers})
    await send({"type": "http.response.body", "body": body})
