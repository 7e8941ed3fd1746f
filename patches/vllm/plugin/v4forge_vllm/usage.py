"""Requests and tokens by key, in the metrics of a replica; a key is there by its name, never by itself.

The tokens are those that vLLM counts for an answer; it leaves them in the request's state when the answer has ended,
also where the client has not asked for them. Of an answer that says them itself, as /v1/responses does, they are read
from its end. A stream that its client left has neither: a token an event is counted, where with drafts it may be more,
and no prompt.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import Counter

from v4forge_vllm.keep_alive import COMMENT, is_event_stream

Message = MutableMapping[str, Any]

REQUESTS = Counter("v4forge_requests", "Answers, by the name of the key and their status", ["key", "status"])
PROMPTED = Counter("v4forge_prompt_tokens", "Tokens of prompts, by the name of the key", ["key"])
GENERATED = Counter("v4forge_completion_tokens", "Tokens of answers, by the name of the key", ["key"])
LEFT = 499  # the client has left before there was an answer, as in nginx's logs
# The last of its kind: a request may have such names too, and be repeated before. A quote within an answer's text has a
# backslash before it, so that no text looks like this.
TOLD = re.compile(rb'.*"(?:input|prompt)_tokens": ?(\d+).*"(?:output|completion)_tokens": ?(\d+)', re.DOTALL)


async def count(
    app: Callable[..., Awaitable[None]],
    name: str,
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """The answer of `app`, counted for the key of this name when it has ended, however."""
    state: MutableMapping[str, Any] = scope.setdefault("state", {})
    status, streams, events, last = LEFT, False, 0, b""

    async def noted(message: Message) -> None:
        nonlocal status, streams, events, last
        if message["type"] == "http.response.start":
            status, streams = message["status"], is_event_stream(message)
        elif (body := message.get("body")) and body != COMMENT:
            last = body
            events += 1
        await send(message)

    try:
        await app(scope, receive, noted)
    except Exception:
        status = 500
        raise
    finally:
        REQUESTS.labels(name, str(status)).inc()
        if status == 200:
            prompted, generated = tokens(state, last, events if streams else 0)
            PROMPTED.labels(name).inc(prompted)
            GENERATED.labels(name).inc(generated)


def tokens(state: MutableMapping[str, Any], last: bytes, events: int) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, whose last piece is `last`."""
    if told := getattr(state.get("request_metadata"), "final_usage_info", None):
        return told.prompt_tokens, told.completion_tokens or 0
    if found := TOLD.match(last):
        return int(found[1]), int(found[2])
    return 0, events
