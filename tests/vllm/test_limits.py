"""That the router says when it is full, and that one source cannot fill it. A real haproxy with the router's
configuration, before stand-ins."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from balanced import Router, router, up, wait_for

from v4forge.serving.haproxy import Limits

pytestmark = pytest.mark.serve

THREADS = 2  # of haproxy that decide at once, each of which may let one too many in


# --- all replicas full


def test_what_no_replica_has_room_for_gets_429_and_nothing_else_does(tmp_path: Path) -> None:
    with router(tmp_path, 2, limits=Limits(running=2, waiting=2)) as front:
        first_s = 4
        answers = front.ask_all([{"first_s": first_s, "n": n} for n in range(16)], lambda: probed(front))
        counts = Counter(answer.status for answer in answers)
        assert set(counts) == {200, 429} and 8 <= counts[200] < 8 + THREADS
        refused = next(answer for answer in answers if answer.status == 429)
        assert refused.headers["retry-after"] == "5" and refused.elapsed_s < first_s
        assert set(json.loads(refused.lines[0])["error"]) == {"message", "type", "code"}
        assert sum(len(worker.seen) for worker in front.workers) == counts[200] + 1  # and the one for this machine
        assert front.ask(n=16).status == 200  # what has ended makes room

        front.workers[0].kill()
        wait_for(lambda: front.ask(at_s=time.monotonic()).status == 200 and up(front) == 1, 20)
        answers = front.ask_all([{"first_s": 2, "n": 20 + n} for n in range(12)])
        assert Counter(answer.status for answer in answers)[200] < 4 + THREADS  # a replica that is down has no room

        front.workers[1].kill()
        wait_for(lambda: front.ask(at_s=time.monotonic()).status == 503, 20)
        answers = front.ask_all([{"n": 40 + n} for n in range(12)])
        assert {answer.status for answer in answers} == {503}  # none is ready: that is not full


def probed(front: Router) -> None:
    """The address of this machine's own goes on."""
    assert front.ask(at=front.admin, n=99).status == 200


# --- one source


def half_sent(front: Router, count: int, stack: ExitStack) -> list[socket.socket]:
    """Connections of 127.0.0.1 with half a head, or a whole one and half a body, in turns; without those that were
    refused at once."""
    url, opened = urlsplit(front.public), []
    for number in range(count):
        body = b"Content-Length: 100000\r\n\r\n{" if number % 2 else b""
        with suppress(ConnectionError):
            client = stack.enter_context(socket.create_connection((str(url.hostname), int(url.port or 80)), timeout=20))
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + body)
            opened.append(client)
    return opened


@pytest.mark.parametrize("count", [400, pytest.param(6000, marks=pytest.mark.soak)])
def test_half_sent_requests_of_one_source_hold_up_no_other(tmp_path: Path, count: int) -> None:
    limits = Limits(per_source=100, request_s=3, descriptors=max(800, count))  # fewer than these requests ask for
    with router(tmp_path, 2, limits=limits) as front, ExitStack() as stack:
        begun = time.monotonic()
        opened = half_sent(front, count, stack)
        other = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2", verify=False))
        for number in range(3):
            asked = time.monotonic()
            assert other.post(f"{front.public}/v1/completions", json={"n": number}).status_code == 200
            assert time.monotonic() - asked < 1
        ends = Counter(end(client) for client in opened)
        assert set(ends) <= {408, "reset"}  # when their time is over, and what was too much at once
        assert 0 < ends[408] <= limits.per_source and time.monotonic() - begun < 30
        assert front.ask(n=9).status == 200


def end(client: socket.socket) -> int | str:
    """How a connection ends: with a status, or with none."""
    try:
        head = client.recv(1000)
    except ConnectionError:
        return "reset"
    return int(head.split()[1]) if head else "reset"
