"""The middleware of the replicas: an answer begins with its first content, and one that begins with an error is one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Sequence
from typing import Any

import pytest

from v4forge.checkout import ROOT

SPEC = importlib.util.spec_from_file_location("first_byte", ROOT / "patches/vllm/plugin/v4forge_vllm/first_byte.py")
assert SPEC and SPEC.loader
first_byte = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(first_byte)

ERROR = {"error": {"message": "the engine is dead", "type": "InternalServerError", "param": None, "code": 500}}
TOLD = b"data: " + json.dumps(ERROR).encode() + b"\n\n"
TOKEN = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"
HEAD = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


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

    asyncio.run(first_byte.FirstByte(app)({"type": "http"}, None, send))
    return arrived


def test_a_head_comes_with_the_first_content() -> None:
    assert [message.get("body") for message in sent([b"", TOKEN, DONE])] == [None, TOKEN, DONE, b""]


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
