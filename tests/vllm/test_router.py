"""Two replicas of a real vLLM behind the router: what clients get, also while a replica dies."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import time
from urllib.parse import urlsplit

import pytest
from served import Served, serve, wait_until

from benchmarks.clients import kill, message, processes
from v4forge.serving import settings

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

BY_DRAFTS = (settings.DRAFTS, settings.DRAFT_METHOD)  # what --drafts sets


def test_the_start_ends_with_the_address(tiny: Served) -> None:
    ready = tiny.said.splitlines()[-1]
    assert ready.startswith(f"ready: {tiny.deployment.url}, deepseek-v4-tiny-w4a16, context 8,192, k=2, ")
    assert ready.endswith(" KV tokens a replica, 2 replicas")


def test_a_chat_is_answered(tiny: Served) -> None:
    outcome = tiny.ask(message("hello", tokens=12))
    assert outcome.whole and outcome.finish == "length"
    assert outcome.body["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("stream", [False, True], ids=["before the first byte", "streaming"])
def test_a_client_that_leaves_frees_its_sequence_within_a_second(tiny: Served, stream: bool) -> None:
    url, content = urlsplit(tiny.deployment.url), json.dumps(message("leave", tokens=4000, stream=stream)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    head += f"Content-Type: application/json\r\nAuthorization: Bearer {tiny.key}\r\n\r\n"
    with socket.create_connection((str(url.hostname), int(url.port or 80)), timeout=60) as leaver:
        leaver.sendall(head.encode() + content)
        wait_until(lambda: tiny.computing == 1, 60)
        assert not stream or leaver.recv(1)
    time.sleep(1)
    assert tiny.computing == 0


def test_a_stream_has_the_same_text_as_the_whole_answer(tiny: Served) -> None:
    whole, streamed = tiny.ask_all([message("hello", 12), message("hello", 12, stream=True)])
    assert whole.whole and streamed.whole
    assert whole.text == streamed.text != ""


def test_a_forced_tool_call_comes_parsed(tiny: Served) -> None:
    takes = {"type": "object", "properties": {"n": {"type": "integer", "enum": [1, 2]}}, "required": ["n"]}
    function = {"name": "add", "strict": True, "parameters": takes | {"additionalProperties": False}}
    tool = {"type": "function", "function": function}
    forced = {"tool_choice": {"type": "function", "function": {"name": "add"}}, "ignore_eos": False}
    outcome = tiny.ask(message("add", tokens=256, tools=[tool], chat_template_kwargs={"thinking": False}, **forced))
    assert outcome.status == 200, outcome.body
    (call,) = outcome.body["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    assert json.loads(call["function"]["arguments"])["n"] in (1, 2)


def test_two_hundred_streams_at_once_all_end_whole_on_both_replicas(tiny: Served) -> None:
    outcomes = tiny.ask_all([message(f"story {number}", tokens=8, stream=True) for number in range(200)])
    assert [outcome for outcome in outcomes if not outcome.whole] == []
    shares = [sum(outcome.replica == str(replica) for outcome in outcomes) for replica in (0, 1)]
    assert sum(shares) == 200 and min(shares) >= 60, shares


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"model": "deepseek-v4-tiny-w4a16"}, 400),
        ({"model": "another", "messages": [{"role": "user", "content": "x"}]}, 404),
        (message("x", tokens=4, temperature=-1), 400),
        (message("word " * 20000, tokens=4), 400),
        (message("x", tokens=100000), 400),
    ],
    ids=["no messages", "another model", "bad temperature", "oversized prompt", "too many tokens"],
)
def test_a_bad_request_is_told_what_is_wrong(tiny: Served, body: dict[str, object], status: int) -> None:
    outcome = tiny.ask({"stream": False} | body)
    assert outcome.status in (status, 422), outcome.body
    assert outcome.body["error"]["message"]


def test_without_the_key_nothing_is_answered_but_health(tiny: Served) -> None:
    for key in ("", "open"):
        (outcome,) = Served(tiny.folder, "", key).ask_all([message("x", tokens=2)])
        assert outcome.status == 401
    done = subprocess.run(
        ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", f"{tiny.deployment.url}/health"], capture_output=True
    )
    assert done.stdout == b"200"


def test_only_the_api_is_on_the_public_address(tiny: Served) -> None:
    for path in ("/metrics", "/router/stats", "/router/metrics", "/docs", "/version"):
        code = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", f"{tiny.deployment.url}{path}"]
        assert subprocess.run(code, capture_output=True).stdout == b"404", path


def test_the_key_is_in_no_argument_and_no_log(tiny: Served) -> None:
    listed = subprocess.run(["ps", "-wweo", "args="], capture_output=True, text=True, check=True).stdout
    assert "sesame" not in listed
    for path in tiny.folder.rglob("*"):
        if path.is_file() and "cache" not in path.parts and path.name != "api_key":
            assert b"sesame" not in path.read_bytes(), path
    assert stat.S_IMODE((tiny.folder / "keys/api_key").stat().st_mode) == 0o600


def test_the_status_shows_both_and_what_they_do(tiny: Served) -> None:
    rows = json.loads(tiny.program("status", "--json").stdout)
    assert [row["name"] for row in rows] == ["replica0", "replica1"]
    for row in rows:
        assert row["state"] == "ready" and row["model"] == "deepseek-v4-tiny-w4a16" and row["uptime_s"] > 0
        assert row["running"] == row["waiting"] == 0 and 0 <= row["acceptance"] <= 1
    shown = tiny.program("status")
    assert shown.returncode == 0 and tiny.deployment.url in shown.stdout


def again(tiny: Served, *more: str) -> subprocess.CompletedProcess[str]:
    """The command that started it, once more; the replicas that run go on."""
    deployment = tiny.deployment
    before = [processes(deployment.replica_port(number)).keys() for number in (0, 1)]
    named = {name: value for name, value in deployment.overrides.items() if name not in BY_DRAFTS}
    words = ["--artifact", deployment.artifact, "--folder", str(tiny.folder), "--port", str(deployment.port)]
    words += ["--backend", "cpu", "--drafts", str(deployment.serving.drafts), "--drain", str(deployment.drain_s)]
    words += ["--set", *(f"{name}={value}" for name, value in named.items())]
    done = serve("up", *words, *more, key="sesame")
    assert [processes(deployment.replica_port(number)).keys() for number in (0, 1)] == before != [set(), set()]
    return done


@pytest.mark.soak  # below: one whose probe fails
def test_a_second_start_of_the_same_is_no_start(tiny: Served) -> None:
    done = again(tiny)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_second_start_whose_probe_fails_stops_nothing(tiny: Served) -> None:
    failing = again(tiny, "--min-acceptance", "0.99")  # more than any model's
    assert failing.returncode == 1 and "the probe failed: replica 0: drafts: " in failing.stderr


def test_a_second_start_of_something_else_is_refused(tiny: Served) -> None:
    other = again(tiny, "--drain", "7")
    assert other.returncode == 1
    assert other.stderr.splitlines() == [
        "error: other replicas run already, with another drain_s",
        "hint: make serve-stop",
    ]


@pytest.mark.soak  # of an engine alone: tests/vllm/test_endurance.py
@pytest.mark.last
def test_a_replica_killed_under_load_fails_no_request_that_had_not_begun_to_stream(tiny: Served) -> None:
    victim = processes(tiny.deployment.replica_port(1))

    def strike() -> None:
        time.sleep(2)
        kill(victim)

    requests = [message(f"tale {number}", tokens=40, stream=number % 2 == 0) for number in range(64)]
    outcomes = tiny.ask_all(requests, meanwhile=strike)
    failed = [outcome for outcome in outcomes if not outcome.whole]
    assert [outcome for outcome in failed if not outcome.text] == []
    assert all(outcome.replica == "1" for outcome in failed)
    # It comes back by itself.
    wait_until(lambda: tiny.program("status", "--json").returncode == 0, 240)
    assert set(processes(tiny.deployment.replica_port(1))).isdisjoint(victim)


@pytest.mark.last
def test_a_stop_takes_nothing_new_and_finishes_what_runs(tiny: Served) -> None:
    stopped: list[subprocess.CompletedProcess[str]] = []
    url = tiny.deployment.url

    def stop() -> None:
        time.sleep(1.5)
        stopped.append(tiny.program("stop"))

    outcomes = tiny.ask_all([message(f"end {number}", tokens=120, stream=True) for number in range(8)], meanwhile=stop)
    assert [outcome for outcome in outcomes if not outcome.whole] == []
    assert stopped[0].returncode == 0 and stopped[0].stdout.splitlines()[-1] == "serve: stopped"
    refused = subprocess.run(["curl", "-s", f"{url}/health"], capture_output=True)
    assert refused.returncode == 7  # nobody listens
    assert not (tiny.folder / "keys/api_key").exists()
    assert tiny.program("stop").stdout.startswith("nothing is served")
