"""One replica is asked: an authority of its own, answers that are refused for now, what is not spoken there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import network_stand_in
import openai_stand_in as stand_in
import pytest

from v4forge import network
from v4forge.errors import UserError
from v4forge.serving import client
from v4forge.serving.client import Endpoint


@pytest.fixture(autouse=True)
def no_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in network.AUTHORITIES:
        monkeypatch.delenv(name, raising=False)


def at(url: str) -> Endpoint:
    return Endpoint(0, url, pinned=False)


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server with TLS, and who has signed its certificate."""
    authority, both = network_stand_in.certificate(tmp_path)
    server = stand_in.Server(stand_in.saying("hello"), 0)
    network_stand_in.secured(server, both)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}", authority
    server.shutdown()
    server.server_close()


def test_an_authority_of_one_s_own_is_a_variable(secure: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, authority = secure
    with pytest.raises(UserError, match="certificate is not trusted") as found:
        client.ask(at(url), "/v1/models")
    assert "REQUESTS_CA_BUNDLE=" in found.value.hint
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # is for the network, not for what is measured
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority))
    assert client.ask(at(url), "/v1/models")["data"]
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nonexistent/ca.pem")
    with pytest.raises(UserError, match=r"REQUESTS_CA_BUNDLE=/nonexistent/ca\.pem cannot be read"):
        client.ask(at(url), "/v1/models")


def test_tls_where_none_is_spoken_is_told(secure: tuple[str, Path]) -> None:
    with stand_in.serving(stand_in.saying("hello")) as server, pytest.raises(UserError, match="TLS"):
        client.ask(at(server.url.replace("http:", "https:")), "/v1/models")
    with pytest.raises(UserError):
        client.ask(at(secure[0].replace("https:", "http:")), "/v1/models")


def refused(status: int, **headers: str) -> stand_in.Answer:
    def answer(handler: stand_in.Handler, _: Any) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@pytest.mark.parametrize("status", [429, 503])
def test_who_asks_to_be_asked_later_is_asked_later(status: int) -> None:
    with stand_in.serving(stand_in.saying("hello")) as server:
        server.fault = lambda number: refused(status, Retry_After="1") if number < 3 else None
        started = time.monotonic()
        assert client.ask(at(server.url), "/v1/completions", {"prompt": "x"})["choices"]
        assert len(server.asked) == 3 and time.monotonic() - started >= 2


def test_too_many_requests_without_a_time_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)
    with stand_in.serving(stand_in.saying("hello")) as server:
        server.fault = lambda number: refused(429) if number < 4 else None
        assert client.ask(at(server.url), "/v1/completions", {"prompt": "x"})["choices"]


def test_later_than_an_answer_may_take_is_an_error_at_once() -> None:
    with stand_in.serving(stand_in.saying("hello")) as server:
        server.fault = lambda _: refused(429, Retry_After="600")
        with pytest.raises(UserError, match=r"HTTP 429, come back in 600 s, where an answer has 5 s"):
            client.ask(at(server.url), "/v1/completions", {"prompt": "x"}, 5)
        assert len(server.asked) == 1


def test_an_unavailable_server_that_says_no_time_is_an_error_at_once() -> None:
    with stand_in.serving(stand_in.saying("hello")) as server:
        server.fault = lambda _: refused(503)
        with pytest.raises(UserError, match="HTTP 503"):
            client.ask(at(server.url), "/v1/completions", {"prompt": "x"}, 5)
