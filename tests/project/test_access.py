"""The middleware that says who gets in, before a small application in the place of vLLM's."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

sys.path.append(str(Path(__file__).resolve().parents[2] / "patches" / "vllm" / "plugin"))

from v4forge_vllm import access
from v4forge_vllm import keys as replicas_keys
from v4forge_vllm.access import Access
from v4forge_vllm.keep_alive import Stream

from v4forge.errors import UserError
from v4forge.serving import keys

CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 11, "completion_tokens": 7}


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class App:
    """Answers what it is told, as vLLM would: the tokens are in the request's state, where they are in no text."""

    def __init__(self, **answer: Any) -> None:
        self.answer = {"status": 200, "pieces": [b"{}"], "stream": False, "usage": USAGE} | answer
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        answer = self.answer
        kind = b"text/event-stream; charset=utf-8" if answer["stream"] else b"application/json"
        await send({"type": "http.response.start", "status": answer["status"], "headers": [(b"content-type", kind)]})
        for piece in answer["pieces"]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if answer["usage"]:
            told = SimpleNamespace(final_usage_info=SimpleNamespace(**answer["usage"]))
            scope.setdefault("state", {})["request_metadata"] = told
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two keys, one of them for six requests a minute."""
    (tmp_path / "keys").write_text("# ours\nann:open\nbob:sesame:6\n\n")
    monkeypatch.setenv(access.FILE, str(tmp_path / "keys"))
    monkeypatch.delenv(access.REPLICAS, raising=False)
    return tmp_path / "keys"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ask(app: Any, path: str = CHAT, key: str = "", method: str = "POST") -> httpx.Response:
    async def one() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
            return await client.request(method, path, headers={"Authorization": f"Bearer {key}"} if key else {})

    return asyncio.run(one())


def counted(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"v4forge_{name}_total", labels) or 0.0


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """How much a counter has grown since its first look."""
    before: dict[str, float] = {}

    def grown(name: str, **labels: str) -> float:
        now, place = counted(name, **labels), f"{name} {labels}"
        return now - before.setdefault(place, now)

    yield grown


@pytest.mark.parametrize("path", ["/invocations", "/tokenize", "/v1/load_lora_adapter", "/docs", "/v1/models/", "/x"])
def test_what_is_not_served_is_not_found_whoever_asks(file: Path, path: str) -> None:
    app = App()
    for key in ("", "open"):
        answer = ask(Access(app), path, key)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == 404
    assert app.asked == []


@pytest.mark.parametrize("path", sorted(access.SERVED))
def test_what_is_served_asks_for_a_key(file: Path, path: str) -> None:
    app = App()
    before = Access(app)
    assert [ask(before, path, key).status_code for key in ("", "wrong", "open", "sesame")] == [401, 401, 200, 200]
    assert app.asked == [path] * 2
    assert ask(before, path, method="OPTIONS").status_code == 200  # which a browser asks without


def test_health_and_metrics_are_open(file: Path) -> None:
    assert [ask(Access(App()), path, method="GET").status_code for path in sorted(access.OPEN)] == [200, 200]


def test_without_a_file_no_key_is_asked_for_and_the_paths_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(access.FILE, raising=False)
    assert [ask(Access(App()), path).status_code for path in (CHAT, "/tokenize")] == [200, 404]


def test_a_key_that_is_added_or_taken_away_counts_within_a_second(file: Path, clock: Clock) -> None:
    before = Access(App(), clock)
    assert ask(before, key="new").status_code == 401
    text = file.read_text()
    file.write_text(text + "cyd:new\n")  # in its place
    clock.now_s += 1
    assert ask(before, key="new").status_code == 200
    (file.parent / "other").write_text("cyd:newer\n")
    os.replace(file.parent / "other", file)  # by another file
    clock.now_s += 1
    assert [ask(before, key=key).status_code for key in ("new", "open", "newer")] == [401, 401, 200]


def test_a_file_of_kubernetes_changes_with_the_link_that_it_is(tmp_path: Path, file: Path, clock: Clock) -> None:
    for version in ("1", "2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(f"ann:key{version}\n")
    file.unlink()
    file.symlink_to("data/keys")
    (tmp_path / "data").symlink_to("1")
    before = Access(App(), clock)
    assert ask(before, key="key1").status_code == 200
    (tmp_path / "later").symlink_to("2")
    os.replace(tmp_path / "later", tmp_path / "data")
    clock.now_s += 1
    assert [ask(before, key=key).status_code for key in ("key1", "key2")] == [401, 200]


@pytest.mark.parametrize("fault", ["gone", "empty", "bytes", "folder"])
def test_nobody_gets_in_while_the_file_cannot_be_read(file: Path, clock: Clock, fault: str) -> None:
    before, text = Access(App(), clock), file.read_text()
    assert ask(before, key="open").status_code == 200
    file.unlink()
    if fault == "folder":
        file.mkdir()
    elif fault != "gone":
        file.write_bytes(b"" if fault == "empty" else b"ann:\xff\n")
    clock.now_s += 1
    assert [ask(before, key=key).status_code for key in ("open", "", "x")] == [503] * 3
    assert ask(Access(App(), clock), key="open").status_code == 503  # and so after a start
    file.rmdir() if fault == "folder" else file.unlink(missing_ok=True)
    file.write_text(text)
    clock.now_s += 1
    assert ask(before, key="open").status_code == 200


def test_a_line_that_is_no_key_is_good_for_nobody_and_told_by_its_number_alone(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text("ann:open\nno key at all\n")
    with caplog.at_level(logging.INFO, "vllm.v4forge"):
        before = Access(App())
        assert ask(before, key="open").status_code == 200
        assert ask(before, key="no key at all").status_code == 401
    assert "line 2 " in caplog.text and "open" not in caplog.text and "at all" not in caplog.text


@pytest.mark.parametrize(
    ("lines", "fine"),
    [
        ("sesame\n", True),
        ("a.b-c_1:k+/=!\r\nb:k:60\n# c\n\n", True),
        ("a:old\na:new\n", True),
        ("a:k:0\n", False),
        ("a:k:x:1\n", False),
        (":k\n", False),
        ("-:k\n", False),
        ("two words\n", False),
        ("a:k\u2028b:l\n", True),
        ("schlüssel\n", False),
    ],
)
def test_what_is_refused_before_a_start_is_what_a_replica_would_leave_out(lines: str, fine: bool) -> None:
    told = [(key.name, key.limit) for key in replicas_keys.parse(lines)]
    if fine:
        assert [(key.name, key.limit) for key in keys.parse(lines, "keys.txt")] == told != []
    else:
        assert told == []
        with pytest.raises(UserError, match=r"line 1 of keys\.txt is no key"):
            keys.parse(lines, "keys.txt")


def test_a_limit_is_a_keys_own_and_says_when_to_come_back(file: Path, clock: Clock) -> None:
    before = Access(App(), clock)
    assert [ask(before, key="sesame").status_code for _ in range(7)] == [200] * 6 + [429]
    refused = ask(before, key="sesame")
    assert refused.headers["retry-after"] == "10" and "6 requests a minute" in refused.json()["error"]["message"]
    assert ask(before, key="open").status_code == 200
    assert ask(before, "/v1/models", "sesame", method="GET").status_code == 200  # costs nothing, is not counted
    clock.now_s += 10
    assert [ask(before, key="sesame").status_code for _ in range(2)] == [200, 429]
    file.write_text("bob:sesame:60\n")  # another limit counts at once
    clock.now_s += 1
    assert [ask(before, key="sesame").status_code for _ in range(61)] == [200] * 60 + [429]


def test_each_of_several_replicas_admits_its_share(file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(access.REPLICAS, "2")
    replicas = [Access(App(), clock) for _ in range(2)]
    assert [[ask(one, key="sesame").status_code for _ in range(4)] for one in replicas] == [[200] * 3 + [429]] * 2
    monkeypatch.setenv(access.REPLICAS, "8")
    one = Access(App(), clock)
    assert [ask(one, key="sesame").status_code for _ in range(2)] == [200, 429]
    assert ask(one, key="sesame").headers["retry-after"] == "80"


def test_requests_and_tokens_are_counted_by_the_name_of_the_key(file: Path, clock: Clock, added: Any) -> None:
    rows = (("ann", "200"), ("bob", "200"), ("bob", "429"), ("-", "401"), ("-", "404"), ("ann", "400"))
    for name, status in rows:
        added("requests", key=name, status=status)
    for name in ("ann", "bob"):
        added("prompt_tokens", key=name), added("completion_tokens", key=name)
    before = Access(App(), clock)
    for key, path in (("open", CHAT), *[("sesame", CHAT)] * 7, ("wrong", CHAT), ("open", "/tokenize")):
        ask(before, path, key)
    ask(Access(App(status=400, pieces=[b'{"error": {}}'], usage=None), clock), key="open")
    assert [added("requests", key=name, status=status) for name, status in rows] == [1, 6, 1, 1, 1, 1]
    assert [added("completion_tokens", key=name) for name in ("ann", "bob")] == [7, 42]
    assert [added("prompt_tokens", key=name) for name in ("ann", "bob")] == [11, 66]
    assert not [text for text in map(str, REGISTRY.collect()) if "sesame" in text]


TOKEN = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
TOLD = (
    b'{"metadata": {"input_tokens": 0, "output_tokens": 0}, "output": [{"text": "\\"input_tokens\\": 5"}],'
    b' "usage": {"input_tokens": 3, "output_tokens": 2}}'
)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        ({"pieces": [TOKEN] * 9, "stream": True}, (11, 7)),
        ({"pieces": [TOKEN] * 9, "stream": True, "usage": None}, (0, 9)),
        ({"pieces": [TOLD], "usage": None}, (3, 2)),
        ({"pieces": [TOKEN, b"data: " + TOLD + b"\n\n"], "stream": True, "usage": None}, (3, 2)),
        ({"pieces": [b'{"data": []}'], "usage": None}, (0, 0)),
        ({"pieces": [TOKEN], "stream": True, "usage": {"prompt_tokens": 5, "completion_tokens": None}}, (5, 0)),
    ],
    ids=["a stream", "a stream that was left", "it says so itself", "at its end", "no tokens at all", "none yet"],
)
def test_the_tokens_of_an_answer(file: Path, answer: dict[str, Any], tokens: tuple[int, int], added: Any) -> None:
    names = ("prompt_tokens", "completion_tokens")
    assert [added(name, key="ann") for name in names] == [0, 0]
    ask(Access(App(**answer)), key="open")
    assert tuple(added(name, key="ann") for name in names) == tokens


def test_an_answer_that_never_came_is_counted_too(file: Path, added: Any) -> None:
    async def broken(*_: Any) -> None:
        raise ValueError("of vLLM")

    async def left(*_: Any) -> None: ...

    assert added("requests", key="ann", status="500") == added("requests", key="ann", status="499") == 0
    with pytest.raises(ValueError, match="of vLLM"):
        ask(Access(broken), key="open")
    scope = {"type": "http", "path": CHAT, "method": "POST", "headers": [(b"authorization", b"bearer open")]}
    asyncio.run(Access(left)(scope, None, None))  # type: ignore[arg-type]
    assert added("requests", key="ann", status="500") == added("requests", key="ann", status="499") == 1


def test_a_websocket_is_refused_and_the_start_of_the_server_passes(file: Path) -> None:
    asked: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    for scope in ({"type": "lifespan"}, {"type": "websocket", "path": "/v1/realtime"}):
        asyncio.run(Access(app)(scope, None, send))  # type: ignore[arg-type]
    assert asked == ["lifespan"] and [message["type"] for message in sent] == ["websocket.close"]


def test_no_comment_follows_the_end_that_came_when_one_was_due() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def ends() -> None:
        stream = Stream(send, 60)
        stream.last_s -= 61
        stream._look()
        await stream.send({"type": "http.response.body", "body": b""})
        assert stream.comment is not None
        await stream.comment

    asyncio.run(ends())
    assert [message["body"] for message in sent] == [b""]


def test_the_errors_have_the_form_of_the_routers(file: Path) -> None:
    error = json.loads(ask(Access(App()), key="wrong").content)["error"]
    assert error == {"message": "there is no such API key", "type": "access", "code": 401}
