"""A real vLLM whose engine hangs, and one that does not: what the watchdog makes of both. By night."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from served import Served, wait_until

from benchmarks.clients import Outcome, message, processes

pytestmark = [pytest.mark.serve, pytest.mark.soak, pytest.mark.timeout(900)]

WATCHDOG_S = 20


def leave(served: Served) -> None:
    """Asks for much, and goes when the answer has begun."""
    url, content = urlsplit(served.deployment.url), json.dumps(message("x", tokens=4000, stream=True)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    with socket.create_connection((str(url.hostname), int(url.port or 80)), timeout=60) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
        assert client.recv(1)


def test_an_engine_that_hangs_in_its_first_step_is_started_again_and_an_idle_one_is_not(
    start: Callable[..., Served], tiny_artifact: Path
) -> None:
    served = start(tiny_artifact, "--drafts", "2", "--replicas", "1", "--watchdog", str(WATCHDOG_S))
    port = served.deployment.replica_port(0)
    before = processes(port)
    time.sleep(1.5 * WATCHDOG_S)
    leave(served)
    time.sleep(1.5 * WATCHDOG_S)
    assert processes(port).keys() == before.keys()
    (engine,) = [pid for pid, words in before.items() if "EngineCore" in words]
    os.kill(engine, signal.SIGSTOP)
    outcomes: list[Outcome] = []
    client = threading.Thread(target=lambda: outcomes.append(served.ask(message("y", tokens=4))))
    begun = time.monotonic()
    client.start()
    wait_until(lambda: not before.keys() & processes(port).keys(), 3 * WATCHDOG_S)
    assert time.monotonic() - begun >= WATCHDOG_S
    client.join()
    assert [outcome.status for outcome in outcomes] == [502]  # there is no other replica
    wait_until(lambda: served.program("status", "--json").returncode == 0, 400)
    assert served.ask(message("z", tokens=4)).whole
