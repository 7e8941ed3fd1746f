"""What a client gets through the middleware that says who gets in: streams, with vLLM's own uvicorn, before a small
application; and a real vLLM, whichever way a request comes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from balanced import wait_for
from ports import free_ports
from served import ROOT, SERVE_ENVIRONMENT, Served

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

SILENCE_S = 0.2
COMMENT = ": keep-alive"
EVENT = 'data: {"choices": [{"delta": {"content": "a"}}]}'
KEY = {"Authorization": "Bearer open"}


@dataclass(frozen=True)
class Guarded:
    """A replica whose vLLM is a stand-in."""

    port: int
    file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self, **asked: Any) -> list[tuple[float, str]]:
        """The lines of a stream that are not empty, and after how many seconds each came."""
        begun = time.monotonic()
        with httpx.stream("POST", f"{self.url}/v1/completions", json=asked, headers=KEY, timeout=30) as answer:
            assert answer.status_code == 200
            return [(time.monotonic() - begun, line) for line in answer.iter_lines() if line]

    def running(self) -> int:
        return int(httpx.get(f"{self.url}/version", headers=KEY).json()["running"])


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(free_ports(1), tmp_path_factory.mktemp("keys") / "keys")
    made.file.write_text("ann:open\n")
    words = [SERVE_ENVIRONMENT / "bin/python", ROOT / "tests/support/guarded_app.py", str(made.port), str(SILENCE_S)]
    log = made.file.with_name("log")
    with open(log, "wb") as output:
        server = subprocess.Popen(
            words, stdout=output, stderr=output, env=os.environ | {"API_KEY_FILE": str(made.file)}
        )
    try:
        wait_for(lambda: answers(made.url), 60)
        yield made
        assert "Exception" not in log.read_text() and "Traceback" not in log.read_text()
    finally:
        server.terminate()
        server.wait(30)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_silent_stream_gets_comments_before_its_first_event_and_between_two(guarded: Guarded) -> None:
    lines = [line for _, line in guarded.lines(events=2, first_s=0.7, event_s=0.5)]
    assert lines == [COMMENT] * 3 + [EVENT] + [COMMENT] * 2 + [EVENT, "data: [DONE]"]


def test_a_stream_that_says_something_gets_none_and_its_events_come_as_they_are_made(guarded: Guarded) -> None:
    came = guarded.lines(events=20, event_s=0.05)
    assert [line for _, line in came if line != COMMENT] == [EVENT] * 20 + ["data: [DONE]"]
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(came)]
    assert median(gaps) == pytest.approx(0.05, rel=0.6)
    # A comment after a silence only, as there may be one beside other work.
    assert all(gap > SILENCE_S / 2 for gap, (_, line) in zip(gaps, came[1:], strict=True) if line == COMMENT)


def test_no_comment_comes_within_an_event_nor_in_an_answer_that_is_no_stream(guarded: Guarded) -> None:
    lines = [line for _, line in guarded.lines(events=2, event_s=0.5, torn=True)]
    assert [line for line in lines if line != COMMENT] == [EVENT] * 2 + ["data: [DONE]"]
    assert COMMENT in lines
    whole = httpx.post(f"{guarded.url}/v1/completions", json={"first_s": 0.5}, headers=KEY, timeout=30)
    assert whole.content == b"{}"


@pytest.mark.parametrize("first_s", [0, 30], ids=["streaming", "while it is silent"])
def test_a_client_that_leaves_is_told_on_at_once(guarded: Guarded, first_s: float) -> None:
    content = json.dumps({"events": 600, "event_s": 0.1, "first_s": first_s}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer open\r\n"
    with socket.create_connection(("127.0.0.1", guarded.port)) as client:
        client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(lambda: guarded.running() == 1, 5)
        assert client.recv(1)
    wait_for(lambda: guarded.running() == 0, 10)  # which it would be in 30 s or 60


def test_a_client_that_reads_nothing_for_long_gets_its_stream_whole(guarded: Guarded) -> None:
    body = {"events": 1000, "more": 20_000}
    with httpx.stream("POST", f"{guarded.url}/v1/completions", json=body, headers=KEY, timeout=30) as answer:
        time.sleep(4 * SILENCE_S)  # more than its buffers hold has been made
        lines = [line for line in answer.iter_lines() if line]
    assert lines.count(EVENT) == 1000 and lines[-1] == "data: [DONE]"


def test_a_long_request_that_does_not_get_in_is_told_why(guarded: Guarded) -> None:
    for _ in range(2):  # and the connection may be kept
        refused = httpx.post(f"{guarded.url}/v1/completions", content=b"x" * 2_000_000)
        assert refused.status_code == 401


def test_a_key_that_is_added_gets_in_within_two_seconds_and_without_the_file_nobody_does(guarded: Guarded) -> None:
    def status(key: str) -> int:
        return httpx.get(f"{guarded.url}/version", headers={"Authorization": f"Bearer {key}"}).status_code

    assert status("new") == 401
    guarded.file.write_text("ann:open\nbob:new\n")
    assert wait_for(lambda: status("new") == 200, 5) < 2
    away = guarded.file.rename(guarded.file.with_name("away"))
    assert wait_for(lambda: status("open") == 503, 5) < 2
    away.rename(guarded.file)
    wait_for(lambda: status("open") == 200, 5)
    told = httpx.get(f"{guarded.url}/metrics").text
    assert "running" in told  # the application's: the middleware asks no key for it


# --- a real vLLM


def ways_in(tiny: Served) -> dict[str, str]:
    deployment = tiny.deployment
    replica = f"http://127.0.0.1:{deployment.replica_port(1)}"
    return {"the router": deployment.url, "its address for this machine": deployment.admin_url, "a replica": replica}


@pytest.mark.parametrize("way", ["the router", "its address for this machine", "a replica"])
def test_whichever_way_a_request_comes_it_needs_a_key_and_finds_the_api_alone(tiny: Served, way: str) -> None:
    url, body = ways_in(tiny)[way], {"model": tiny.deployment.serving.model, "prompt": "x", "max_tokens": 1}
    with httpx.Client(base_url=url, timeout=60) as client:
        for path in ("/invocations", "/tokenize", "/detokenize", "/v1/load_lora_adapter", "/docs", "/pooling"):
            for key in ("", tiny.key):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                assert client.post(path, json=body, headers=headers).status_code == 404, path
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for path in ("/v1/completions", "/v1/messages", "/v1/responses"):
                assert client.post(path, json=body, headers=headers).status_code == 401, path
            assert client.get("/v1/models", headers=headers).status_code == 401
        right = {"Authorization": f"Bearer {tiny.key}"}
        assert client.post("/v1/completions", json=body, headers=right).status_code == 200


def test_a_key_that_is_added_and_taken_away_again_counts_within_two_seconds(tiny: Served, tmp_path: Path) -> None:
    replicas = [f"http://127.0.0.1:{tiny.deployment.replica_port(number)}" for number in (0, 1)]
    body = {"model": tiny.deployment.serving.model, "prompt": "one two three", "max_tokens": 5, "ignore_eos": True}

    def statuses(key: str) -> list[int]:
        headers = {"Authorization": f"Bearer {key}"}
        return [httpx.get(f"{url}/v1/models", headers=headers).status_code for url in replicas]

    def counted(replica: str, name: str, key: str) -> float:
        found = re.search(rf'^v4forge_{name}_total{{key="{key}"}} (\S+)', httpx.get(f"{replica}/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    assert statuses("second") == [401, 401]
    keys = tmp_path / "keys.txt"
    keys.write_text(f"first:{tiny.key}\nsecond-one:second\n")
    try:
        done = tiny.program("reload", "--api-key-file", str(keys))
        assert done.returncode == 0, done.stderr
        assert wait_for(lambda: statuses("second") == [200, 200], 5) < 2
        headers = {"Authorization": "Bearer second"}
        for asked in ({}, {"stream": True}):
            answer = httpx.post(f"{replicas[0]}/v1/completions", json=body | asked, headers=headers, timeout=60)
            assert answer.status_code == 200
        text = {"model": body["model"], "input": "one", "max_output_tokens": 5}
        assert httpx.post(f"{replicas[0]}/v1/responses", json=text, headers=headers, timeout=60).status_code == 200
        assert counted(replicas[0], "completion_tokens", "second-one") == 15
        assert counted(replicas[0], "prompt_tokens", "second-one") > 6
        assert statuses(tiny.key) == [200, 200]
    finally:
        keys.write_text(f"{tiny.key}\n")
        tiny.program("reload", "--api-key-file", str(keys))
    assert wait_for(lambda: statuses("second") == [401, 401], 5) < 2
    assert "second-one" in httpx.get(f"{replicas[0]}/metrics").text and tiny.key not in tiny.folder.name


def test_without_its_file_of_keys_nobody_gets_in(tiny: Served) -> None:
    file, url = tiny.folder / "keys/api_key", ways_in(tiny)["a replica"]
    headers = {"Authorization": f"Bearer {tiny.key}"}
    away = file.rename(file.with_name("away"))
    try:
        wait_for(lambda: httpx.get(f"{url}/v1/models", headers=headers).status_code == 503, 5)
        assert httpx.get(f"{url}/v1/models").status_code == 503 and answers(url)
    finally:
        away.rename(file)
    wait_for(lambda: httpx.get(f"{url}/v1/models", headers=headers).status_code == 200, 5)


def test_the_probe_has_seen_who_gets_in(tiny: Served) -> None:
    told = "401 with a wrong key and with no key; 404 for /invocations and /tokenize"
    for replica in (0, 1):
        assert re.search(rf"^replica {replica}: access +ok +{told}$", tiny.said, re.M), tiny.said
