"""serving.probe against a stand-in, for what no real vLLM does on demand. A real one passes it where it is served."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from probe_stand_in import MODEL, Answer, StandIn, completed, fault, metrics, serving, tokens_of

from v4forge import outcomes
from v4forge.errors import UserError
from v4forge.outcomes import FAILED, NOT_CHECKED, OK, Outcome
from v4forge.serving import agreement, client, probe
from v4forge.serving.agreement import TOKENS, Completion
from v4forge.serving.client import PIN, Endpoint
from v4forge.serving.metrics import Counts
from v4forge.serving.probe import PROMPTS, Expected

KEY = "a-secret-key"
LOG = "".join(
    f"(Worker_TP{rank}) INFO 11-25 21:00:00 [guard.py:84] v4forge: {what}: all {n} parameters filled from {m} tensors\n"
    for rank in (0, 1)
    for what, n, m in (("the model", 312, 5000), ("the MTP block", 40, 60))
)
EXPECTED = Expected(MODEL, speculation=True, ranks=2)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with serving() as found:
        yield found


def probed(server: ThreadingHTTPServer, expected: Expected = EXPECTED, key: str = "", log: str = LOG) -> list[Outcome]:
    url = f"http://127.0.0.1:{server.server_port}/"
    return probe.probe(client.endpoints(url, 2, key), expected, lambda replica: log)


def failed(checks: list[Outcome]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.ok}


def test_replicas_without_a_fault_pass_every_check(server: ThreadingHTTPServer) -> None:
    checks = probed(server)
    assert not failed(checks) and all(check.status == OK for check in checks) and len(checks) == 15
    assert checks[-1].detail.startswith(f"the same {3 * TOKENS} tokens of 2 replicas")


def test_a_replica_that_another_one_answers_for_is_told(server: ThreadingHTTPServer) -> None:
    for path in ("/v1/models", "/v1/completions", "/v1/chat/completions", "/metrics"):
        fault(server, 1, path, lambda body: lambda handler: handler.reply(0, *handler.healthy(0, body)))
    found = failed(probed(server))
    assert "replica 0 answered (HTTP 200); replica 1 is down" in found["replica 1: models"]
    assert not any(name.startswith("replica 0") for name in found)


def test_an_answer_of_nobody_known_is_told(server: ThreadingHTTPServer) -> None:
    fault(server, 0, "/v1/models", lambda body: lambda handler: handler.reply(None, 503, "<html>No server</html>"))
    assert "no replica of the router's answered (HTTP 503)" in failed(probed(server))["replica 0: models"]


def test_a_replica_asked_by_itself_needs_no_header(server: ThreadingHTTPServer) -> None:
    fault(server, 0, "/v1/models", lambda body: lambda handler: handler.reply(None, 200, '{"data": [{"id": "flash"}]}'))
    alone = Endpoint(0, f"http://127.0.0.1:{server.server_port}", pinned=False)
    checks = probe.probe([alone], EXPECTED, lambda replica: LOG)
    assert not failed(checks) and checks[-1].status == NOT_CHECKED


@pytest.mark.parametrize("key", ["", "wrong", "not\nprintable", "ключ"])
def test_a_wrong_key_fails_every_question_and_is_not_told(server: ThreadingHTTPServer, key: str) -> None:
    server.RequestHandlerClass.key = KEY  # type: ignore[attr-defined]
    found = failed(probed(server, key=key))
    assert {"replica 0: models", "replica 1: tool call", "replicas agree"} <= found.keys()
    assert "API key" in found["replica 0: models"] or "key printable" in found["replica 0: models"]
    assert not any(key and key in detail for detail in found.values())


def test_the_right_key_is_sent_and_is_not_in_the_endpoints_text(server: ThreadingHTTPServer) -> None:
    server.RequestHandlerClass.key = KEY  # type: ignore[attr-defined]
    assert not failed(probed(server, key=KEY))
    assert KEY not in repr(client.endpoints("http://x", 1, KEY))


def test_a_replica_that_does_not_listen_is_told() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    checks = probe.probe(client.endpoints(f"http://127.0.0.1:{port}", 1), EXPECTED, lambda replica: LOG)
    assert "refused" in failed(checks)["replica 0: models"] and "serve-status" in failed(checks)["replica 0: models"]


def silent(handler: StandIn) -> None:
    time.sleep(3)


def dripping(handler: StandIn) -> None:
    handler.send_response(200)
    handler.send_header(PIN, "0")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def broken_off(handler: StandIn) -> None:
    handler.send_response(200)
    handler.send_header(PIN, "0")
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b"{")


@pytest.mark.parametrize(
    ("answer", "fact"),
    [(silent, "within"), (dripping, "within"), (broken_off, "broke off")],
    ids=("silent", "dripping", "broken off"),
)
def test_an_answer_that_does_not_come_or_end_is_waited_for_so_long(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, answer: Callable[[StandIn], None], fact: str
) -> None:
    monkeypatch.setattr(client, "GET_LIMIT_S", 0.4)
    fault(server, 0, "/v1/models", lambda body: answer)
    started_s = time.monotonic()
    with pytest.raises(UserError, match=fact):
        client.ask(Endpoint(0, f"http://127.0.0.1:{server.server_port}"), "/v1/models")
    assert time.monotonic() - started_s < 2


def test_an_answer_without_end_is_not_read_to_its_end(
    server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MOST_BYTES", 1 << 20)
    fault(server, 0, "/metrics", lambda body: (200, "x" * (2 << 20)))
    with pytest.raises(UserError, match="answered more than 1 MiB"):
        client.metrics(Endpoint(0, f"http://127.0.0.1:{server.server_port}"))


@pytest.mark.parametrize("text", ["", "<html>502</html>", "{", "NaNN", "[" * 100_000])
def test_what_is_not_json_is_told(server: ThreadingHTTPServer, text: str) -> None:
    fault(server, 0, "/v1/models", lambda body: (200, text))
    assert "not JSON" in failed(probed(server))["replica 0: models"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["data", "id", "choices", "message", "logprobs", "tokens", "tool_calls"]), inner
        )
    ),
    max_leaves=6,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=json_values, status=st.sampled_from([200, 200, 200, 400, 500]))
def test_no_answer_in_another_form_is_a_traceback(server: ThreadingHTTPServer, value: Any, status: int) -> None:
    for path in ("/v1/models", "/v1/completions", "/v1/chat/completions"):
        fault(server, 1, path, lambda body: (status, json.dumps(value)))
    found = failed(probed(server))
    assert {"replica 1: models", "replica 1: prompts", "replica 1: tool call", "replica 1: reasoning"} <= found.keys()


def test_another_model_is_told(server: ThreadingHTTPServer) -> None:
    fault(server, 0, "/v1/models", lambda body: (200, '{"data": [{"id": "llama"}]}'))
    assert failed(probed(server))["replica 0: models"].startswith("it serves llama, not flash")


@pytest.mark.parametrize("accepted", [0.0, 0.1])
def test_drafts_that_are_hardly_ever_accepted_fail_the_start(server: ThreadingHTTPServer, accepted: float) -> None:
    server.RequestHandlerClass.accepted = accepted  # type: ignore[attr-defined]
    found = failed(probed(server))
    assert found.keys() == {"replica 0: drafts", "replica 1: drafts"}
    assert "at least 20% expected" in found["replica 0: drafts"] and "C14" in found["replica 0: drafts"]


def test_without_speculation_drafts_are_not_checked_and_that_is_said(server: ThreadingHTTPServer) -> None:
    checks = {check.name: check for check in probed(server, Expected(MODEL, speculation=False, ranks=2))}
    drafts = checks["replica 0: drafts"]
    assert drafts.status == NOT_CHECKED and "without speculation" in drafts.detail
    assert "MTP" not in checks["replica 0: weights"].detail


def test_a_server_that_counts_no_drafts_is_told(server: ThreadingHTTPServer) -> None:
    fault(server, 0, "/metrics", lambda body: (200, "process_start_time_seconds 1\n"))
    assert "runs without speculation" in failed(probed(server))["replica 0: drafts"]


def test_a_replica_that_restarts_in_between_is_told(server: ThreadingHTTPServer) -> None:
    starts = iter((1000.0, 2000.0))
    fault(server, 0, "/metrics", lambda body: (200, metrics(50, 40, next(starts))))
    assert "restarted" in failed(probed(server))["replica 0: drafts"]


def counts(drafts: float, accepted: float, depth: int = 1) -> Counts:
    return Counts(
        drafts=drafts, draft_tokens=drafts * depth, accepted=accepted * depth, accepted_at=(accepted,) * depth
    )


def test_drafting_for_a_few_of_the_tokens_is_not_enough() -> None:
    with pytest.raises(UserError, match="only 20 drafts"):
        probe.acceptance(counts(20, 20), 0.2)


@pytest.mark.parametrize(
    "drafts", [counts(100, 101), counts(float("nan"), 1), counts(float("inf"), 1), counts(200, float("nan"))]
)
def test_counters_that_cannot_be_are_told(drafts: Counts) -> None:
    with pytest.raises(UserError):
        probe.acceptance(drafts, 0.2)


def test_accepted_tokens_without_a_draft_are_told() -> None:
    with pytest.raises(UserError, match=r"/metrics says that 0\.0 of 0\.0 drafts were accepted"):
        probe.acceptance(Counts(drafts=0.0, draft_tokens=0.0, accepted=192.0, accepted_at=(0.0,)), 0.2)


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_few_drafts_that_are_all_accepted_are_enough(depth: int) -> None:
    steps = len(PROMPTS) * (TOKENS // (1 + depth))
    assert "100.0%" in probe.acceptance(counts(steps, steps, depth), 0.2)


def parted(at: int, second: float, token: int = 1) -> Callable[[dict[str, Any]], Answer]:
    """A replica that takes another token than the first from a position on, with the first's as its second best."""

    def answer(body: dict[str, Any]) -> Answer:
        tokens = tokens_of(body["prompt"])
        told = json.loads(completed([*tokens[:at], *(each + token for each in tokens[at:])], second))
        best = told["choices"][0]["logprobs"]["top_logprobs"]
        best[at:] = [{f"token_id:{each + token}": -0.5, f"token_id:{each}": second} for each in tokens[at:]]
        return 200, json.dumps(told)

    return answer


def test_replicas_that_choose_differently_where_it_matters_fail(server: ThreadingHTTPServer) -> None:
    fault(server, 1, "/v1/completions", parted(at=9, second=-3.0))
    detail = failed(probed(server))["replicas agree"]
    assert detail.startswith("replicas 0 and 1 part at token 10 of the English prompt, log-probabilities 2.500 apart")


def test_a_token_that_is_not_among_the_others_best_is_no_tie(server: ThreadingHTTPServer) -> None:
    fault(server, 1, "/v1/completions", parted(at=0, second=-0.51, token=7))
    detail = failed(probed(server))["replicas agree"]
    assert "part at token 1 of" in detail and "not by one of its 5 best" in detail


def test_a_near_tie_of_both_is_told_and_passes(server: ThreadingHTTPServer) -> None:
    fault(server, 0, "/v1/completions", lambda body: (200, completed(tokens_of(body["prompt"]), second=-0.55)))
    fault(server, 1, "/v1/completions", parted(at=3, second=-0.58))
    checks = probed(server)
    assert checks[-1].ok and "part at token 4 of the code prompt, log-probabilities 0.080 apart" in checks[-1].detail


def test_a_tie_for_one_replica_only_is_none(server: ThreadingHTTPServer) -> None:
    fault(server, 0, "/v1/completions", lambda body: (200, completed(tokens_of(body["prompt"]), second=-0.55)))
    fault(server, 1, "/v1/completions", parted(at=3, second=-4.0))
    assert "log-probabilities 3.500 apart" in failed(probed(server))["replicas agree"]


def test_a_replica_that_completes_nothing_does_not_agree(server: ThreadingHTTPServer) -> None:
    fault(server, 1, "/v1/completions", lambda body: (500, '{"error": {"message": "EngineDeadError"}}'))
    found = failed(probed(server))
    assert "EngineDeadError" in found["replica 1: prompts"] and "1 of 2 replicas" in found["replicas agree"]


def test_fewer_tokens_than_asked_for_and_no_numbers_are_told(server: ThreadingHTTPServer) -> None:
    fault(server, 0, "/v1/completions", lambda body: (200, completed(tokens_of(body["prompt"])[:5])))
    fault(server, 1, "/v1/completions", lambda body: (200, completed(tokens_of(body["prompt"]), second=float("nan"))))
    found = failed(probed(server))
    assert "5 tokens were generated" in found["replica 0: prompts"]
    assert "not finite" in found["replica 1: prompts"]


def test_the_distance_of_two_replicas_is_that_of_the_tokens_that_they_share() -> None:
    one = Completion((1, 2, 3), ({1: -0.5}, {2: -0.5}, {3: -0.5}))
    other = Completion((1, 2, 4), ({1: -0.5}, {2: -0.7}, {4: -0.1}))
    assert agreement.parting(one, other) == 2 and agreement.drift(one, other, 2) == pytest.approx(0.2)


def chatting(**message: Any) -> Callable[[dict[str, Any]], Answer]:
    return lambda body: (200, json.dumps({"choices": [{"message": {"content": "Oslo is cold.", **message}}]}))


def call(name: str, arguments: str) -> list[dict[str, Any]]:
    return [{"function": {"name": name, "arguments": arguments}}]


@pytest.mark.parametrize(
    ("calls", "fact"),
    [
        ([], "no tool was called; its answer: 'Oslo is cold.'"),
        (call("get_weather", '{"city": "Os'), "the call's arguments are not JSON: '{\"city\": \"Os'"),
        (call("get_time", '{"city": "Oslo"}'), "it called get_time with"),
        (call("get_weather", "[]"), "it called get_weather with '[]'"),
    ],
)
def test_a_tool_call_that_was_not_parsed_is_told(server: ThreadingHTTPServer, calls: Any, fact: str) -> None:
    fault(server, 0, "/v1/chat/completions", chatting(tool_calls=calls))
    assert fact in failed(probed(server))["replica 0: tool call"]


def test_thoughts_that_were_not_parsed_are_told_and_their_older_name_is_known(server: ThreadingHTTPServer) -> None:
    fault(server, 0, "/v1/chat/completions", chatting())
    fault(server, 1, "/v1/chat/completions", chatting(reasoning_content="Hm."))
    found = failed(probed(server))
    assert "no reasoning was parsed" in found["replica 0: reasoning"] and "replica 1: reasoning" not in found


@pytest.mark.parametrize(
    ("log", "fact"),
    [
        ("", "0 of 2 processes say that all parameters of the model were filled"),
        (LOG.replace("the MTP block", "the other"), "0 of 2 processes say that all parameters of the MTP block"),
        (LOG.splitlines()[0] + "\n", "1 of 2 processes"),
        (LOG.replace("all 312", "all 0"), "parameters of the model"),
    ],
)
def test_parameters_that_nobody_says_were_filled_fail(log: str, fact: str) -> None:
    with pytest.raises(UserError) as caught:
        probe.filled(log, EXPECTED)
    assert fact in caught.value.fact


def test_a_log_that_cannot_be_read_is_told(server: ThreadingHTTPServer) -> None:
    def log(replica: int) -> str:
        raise FileNotFoundError(2, "No such file or directory", "replica0.log")

    url = f"http://127.0.0.1:{server.server_port}"
    found = failed(probe.probe(client.endpoints(url, 1), EXPECTED, log))
    assert "replica0.log" in found["replica 0: weights"]


def test_every_check_is_a_line() -> None:
    found = [
        Outcome("a", OK, "fine"),
        Outcome("longer", FAILED, "two\nlines", "make it"),
        Outcome("b", NOT_CHECKED, "no"),
    ]
    assert outcomes.lines(found) == [
        "a       ok           fine",
        "longer  failed       two lines: make it",
        "b       not checked  no",
    ]


def test_progress_tells_the_replica_and_what_is_asked(server: ThreadingHTTPServer) -> None:
    told: list[tuple[int, str]] = []
    url = f"http://127.0.0.1:{server.server_port}"
    probe.probe(client.endpoints(url, 2), EXPECTED, lambda replica: LOG, lambda *step: told.append(step))
    assert told[0] == (0, "replica 0: models") and told[-1] == (2, "replicas agree")


@pytest.mark.parametrize(
    ("path", "key", "fact"),
    [
        ("/v1/models", KEY, "GET /v1/models with a wrong key was answered with HTTP 200, not 401"),
        ("/tokenize", KEY, "GET /tokenize with the key was answered with HTTP 405, not 404"),
        ("/invocations", "", "GET /invocations with no key was answered with HTTP 405, not 404"),
    ],
)
def test_a_replica_that_lets_anybody_in_is_named(server: ThreadingHTTPServer, path: str, key: str, fact: str) -> None:
    server.RequestHandlerClass.key = "" if path == "/v1/models" else key  # type: ignore[attr-defined]
    if path != "/v1/models":
        fault(server, 1, path, lambda body: (405, "{}"))
    found = failed(probed(server, key=key))
    assert found["replica 1: access"].startswith(f"{fact}: make serve-logs: ")


def test_replicas_that_ask_for_the_key_pass(server: ThreadingHTTPServer) -> None:
    server.RequestHandlerClass.key = KEY  # type: ignore[attr-defined]
    told = {check.name: check.detail for check in probed(server, key=KEY)}
    assert told["replica 0: access"] == "401 with a wrong key and with no key; 404 for /invocations and /tokenize"
