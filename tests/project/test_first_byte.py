"""The middleware that holds an answer's head back until there is something behind it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "patches" / "vllm" / "plugin"))

from v4forge_vllm.first_byte import FirstByte

START = {"type": "http.response.start", "status": 200}


def body(content: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def sent_after_each(messages: list[dict[str, Any]], kind: str = "http") -> list[int]:
    """How many messages have been sent on after each of the application's."""
    sent: list[Any] = []
    counts: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)
            counts.append(len(sent))

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {}

    asyncio.run(FirstByte(app)({"type": kind}, receive, send))
    assert sent == [message for message in messages if message in sent]  # in their order
    return counts


@pytest.mark.parametrize(
    ("messages", "counts"),
    [
        ([START, body(b"token", True), body(b"", False)], [0, 2, 3]),
        ([START, body(b"", True), body(b"token", True)], [0, 0, 2]),
        ([START, body(b"", False)], [0, 2]),
        ([START, body(b"all of it", False)], [0, 2]),
        ([START], [0]),
    ],
    ids=["stream", "an empty piece first", "no content", "whole", "an application that fails before its first token"],
)
def test_the_head_comes_with_the_first_byte_or_the_end(messages: list[dict[str, Any]], counts: list[int]) -> None:
    assert sent_after_each(messages) == counts


def test_what_is_not_http_passes_as_it_is() -> None:
    assert sent_after_each([{"type": "lifespan.startup.complete"}], kind="lifespan") == [1]
