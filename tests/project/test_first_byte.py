"""The middleware that holds an answer's head back until there is something behind it, and makes a stream that begins
with an error an error."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "patches" / "vllm" / "plugin"))

from v4forge_vllm.first_byte import FirstByte

ERROR = {"error": {"message": "the engine is dead", "type": "InternalServerError", "param": None, "code": 500}}
TOLD = b"data: " + json.dumps(ERROR).encode() + b"\n\n"
TOKEN = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
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


def sent(pieces: Sequence[bytes], head: dict[str, Any] = HEAD) -> list[dict[str, Any]]:
    """What a client gets of an answer in these pieces."""
    arrived: list[dict[str, Any]] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send(head)
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message: dict[str, Any]) -> None:
        arrived.append(message)

    asyncio.run(FirstByte(app)({"type": "http"}, None, send))
    return arrived


def test_an_error_before_the_first_token_has_its_status_and_is_the_whole_answer() -> None:
    head, body = sent([TOLD, DONE])
    assert head["status"] == 500 and (b"content-type", b"application/json") in head["headers"]
    assert json.loads(body["body"]) == ERROR and not body.get("more_body")
    assert dict(head["headers"])[b"content-length"] == str(len(body["body"])).encode()


@pytest.mark.parametrize(
    "pieces", [[TOKEN, TOLD, DONE], [b"data: {torn", DONE], [b'{"choices": []}']], ids=["later", "torn", "whole"]
)
def test_another_answer_comes_as_it_is(pieces: list[bytes]) -> None:
    head, *bodies = sent(pieces)
    assert head == HEAD and [message["body"] for message in bodies] == [*pieces, b""]


def test_an_answer_that_is_no_success_comes_as_it_is() -> None:
    assert sent([TOLD], HEAD | {"status": 404})[0]["status"] == 404
