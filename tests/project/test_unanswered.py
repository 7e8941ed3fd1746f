"""The middleware that counts requests which have come whole and have no byte of an answer."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "patches" / "vllm" / "plugin"))

from v4forge_vllm import unanswered
from v4forge_vllm.first_byte import FirstByte

HEAD = {"type": "http.response.start", "status": 200, "headers": []}


def now() -> int:
    (sample,) = [sample for family in unanswered.REQUESTS.collect() for sample in family.samples]
    return int(sample.value)


def body(content: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def counted(
    asked: Sequence[bytes], answer: Sequence[dict[str, Any]], method: str = "POST"
) -> tuple[list[int], list[int]]:
    """How many are counted after each piece of the request, all but the last of which say that more comes, and after
    each message of the answer. In the end it must be none."""
    coming = [{"type": "http.request", "body": each, "more_body": True} for each in asked]
    coming[-1]["more_body"] = False
    taken: list[int] = []
    sent: list[int] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        for _ in asked:
            await receive()
            taken.append(now())
        for message in answer:
            await send(message)
            sent.append(now())
        await receive()  # whether the client has left
        raise ConnectionError

    async def receive() -> MutableMapping[str, Any]:
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(_message: MutableMapping[str, Any]) -> None:
        return None

    with pytest.raises(ConnectionError):
        asyncio.run(FirstByte(app)({"type": "http", "method": method}, receive, send))
    assert now() == 0
    return taken, sent


def test_a_request_counts_from_its_last_byte_to_the_first_of_its_answer() -> None:
    assert counted([b"{", b"}"], [HEAD, body(b"", True), body(b"data: a", True)]) == ([0, 1], [1, 1, 0])


def test_a_comment_is_no_answer_and_the_end_is_one() -> None:
    assert counted([b"{}"], [HEAD, body(b": keep-alive\n\n", True), body(b"", False)]) == ([1], [1, 1, 0])


def test_one_whose_client_leaves_or_that_fails_counts_no_more() -> None:
    assert counted([b"{}"], [HEAD]) == ([1], [1])


def test_what_asks_for_no_computing_counts_nothing() -> None:
    assert counted([b""], [HEAD], method="GET") == ([0], [0])
