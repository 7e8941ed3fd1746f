"""That one fault stays one: clients that leave, replicas that stall, requests that end what computes them. A real
haproxy with the router's configuration, before stand-ins."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from balanced import Router, router, up, wait_for

pytestmark = pytest.mark.serve


# --- a client that leaves


def leaves(front: Router, body: dict[str, object], after_bytes: int) -> None:
    """Sends a request, reads so many bytes of its answer, and goes."""
    url, content = urlsplit(front.public), json.dumps(body).encode()
    with socket.create_connection((str(url.hostname), int(url.port or 80))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        wait_for(lambda: any(worker.running for worker in front.workers), 5)
        if after_bytes:
            client.settimeout(10)
            assert client.recv(after_bytes)


@pytest.mark.parametrize(
    ("stream", "first_byte"), [(True, True), (True, False), (False, False)], ids=["streaming", "before", "whole"]
)
def test_a_client_that_leaves_frees_its_sequence_within_a_second(
    tmp_path: Path, stream: bool, first_byte: bool
) -> None:
    with router(tmp_path, 2) as front:
        body = {"stream": stream, "tokens": 100, "token_s": 0.2, "first_s": 0 if first_byte else 20}
        leaves(front, body, after_bytes=1 if first_byte else 0)
        assert wait_for(lambda: not any(worker.running for worker in front.workers), 10) < 1
        time.sleep(1)
        assert sum(front.seen(**body)) == 1  # and nobody else computes it


def test_a_stream_between_two_slow_tokens_is_freed_too(tmp_path: Path) -> None:
    with router(tmp_path, 1) as front:
        leaves(front, {"stream": True, "tokens": 3, "token_s": 20}, after_bytes=1)
        assert wait_for(lambda: not front.workers[0].running, 10) < 1


# --- a replica that stalls


def test_a_replica_that_stalls_goes_on_with_its_streams_and_nothing_is_sent_on(tmp_path: Path) -> None:
    with router(tmp_path, 2) as front:
        streams = [{"stream": True, "tokens": 30, "token_s": 0.1, "n": n} for n in range(8)]
        later = [{"first_s": 2, "tokens": 2, "n": 8 + n} for n in range(8)]
        answers = front.ask_all([*streams, *later], lambda: front.workers[0].stall(20))
        assert [answer for answer in answers if answer.status != 200 or not answer.whole] == []
        assert max(answer.elapsed_s for answer in answers) > 20  # it did stall
        assert [sum(front.seen(**body)) for body in (*streams, *later)] == [1] * 16


def test_a_health_check_alone_takes_a_replica_away_after_half_a_minute_and_cuts_nothing(tmp_path: Path) -> None:
    with router(tmp_path, 2) as front:
        long: list[object] = []
        body = {"stream": True, "tokens": 60, "token_s": 1}
        thread = threading.Thread(target=lambda: long.append(front.ask(**body, limit_s=90)))
        thread.start()
        wait_for(lambda: any(worker.running for worker in front.workers), 5)
        worker = next(worker for worker in front.workers if worker.running)
        worker.health = 503
        assert wait_for(lambda: up(front) == 1, 60) >= 30
        worker.health = 200
        wait_for(lambda: up(front) == 2, 10)
        thread.join()
        assert [answer.whole for answer in long] == [True]  # type: ignore[attr-defined]


def test_a_replica_that_refuses_connections_gets_nothing_new_at_once(tmp_path: Path) -> None:
    with router(tmp_path, 2) as front:
        front.workers[0].kill()
        wait_for(lambda: front.workers[0].killed, 5)
        assert [front.ask(n=n).status for n in range(6)] == [200] * 6
        assert up(front) == 1
        front.workers[0].restart()
        wait_for(lambda: up(front) == 2, 10)


def test_a_time_out_is_no_reason_to_ask_another(tmp_path: Path) -> None:
    with router(tmp_path, 2, silence_s=2) as front:
        answer = front.ask(first_s=20)
        assert answer.status == 504 and sum(front.seen(first_s=20)) == 1
