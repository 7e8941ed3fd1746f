"""The doctor's checks of hub, token and clock, against a local server."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from doctored import Machine, says

from v4forge import pins
from v4forge.outcomes import FAILED, OK, WARNING, NotChecked
from v4forge.pipeline.doctor import network
from v4forge.pipeline.doctor.host import Host

TOKEN = "hf_abcdefghijklmnop"
STRANGER = "hf_of_somebody_else"
MODEL = f"models/{pins.read()['FLASH_REPO']}"


@dataclass
class Hub:
    url: str = ""
    gated: tuple[str, ...] = ()  # of which anybody may know
    private: tuple[str, ...] = ()
    status: int = 200
    stalls_s: float = 0.0
    ahead_s: float = 0.0
    asked: list[tuple[str, str]] = field(default_factory=list)  # path, authorization


@pytest.fixture
def hub() -> Iterator[Hub]:
    found = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            token = self.headers.get("Authorization", "")
            found.asked.append((self.path, token))
            time.sleep(found.stalls_s)
            name, check, _ = self.path.removeprefix("/api/").partition("/auth-check")
            closed = name in found.private or (bool(check) and name in found.gated)
            status = {f"Bearer {TOKEN}": found.status, f"Bearer {STRANGER}": 403}.get(token, 401)
            body = json.dumps({"gated": "auto" if name in found.gated else False}).encode()
            self.send_response(status if closed else found.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate(time.time() + found.ahead_s, usegmt=True)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, gpus=0)


def host(machine: Machine, hub: Hub, profile: str = "flash", **environment: Any) -> Host:
    return machine.host(profile, {"HF_ENDPOINT": hub.url, **environment})


def test_a_hub_that_answers(machine: Machine, hub: Hub) -> None:
    says(network.hub(host(machine, hub)), OK, f"{hub.url} answers in")
    assert [path for path, _ in hub.asked] == [f"/api/{MODEL}", f"/api/datasets/{pins.read()['CORPUS_REPO']}"]


def test_a_corpus_that_is_here_is_not_asked_for(machine: Machine, hub: Hub, tmp_path: Path) -> None:
    local = dataclasses.replace(host(machine, hub), corpus=tmp_path / "corpus.jsonl")
    says(network.hub(local), OK, f"{hub.url} answers in")
    assert [path for path, _ in hub.asked] == [f"/api/{MODEL}"]
    both = dataclasses.replace(local, source=tmp_path, _made={})
    says(network.hub(both), OK, "nothing is downloaded")
    assert len(hub.asked) == 1


def test_a_hub_that_cannot_be_reached_fails_only_what_downloads(machine: Machine) -> None:
    away = Hub("http://127.0.0.1:9")
    says(network.hub(host(machine, away)), FAILED, "cannot be reached", "unset HF_ENDPOINT")
    says(network.hub(host(machine, away, "tiny")), WARNING, "PROFILE=tiny downloads nothing")


def test_a_hub_that_stalls(machine: Machine, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stalls_s = 1.0
    monkeypatch.setattr(network, "LIMIT_S", 0.2)
    says(network.hub(host(machine, hub)), FAILED, "did not answer within", "unset HF_ENDPOINT")


@pytest.mark.parametrize(
    ("status", "fact"), [(500, "HTTP 500"), (429, "HTTP 429"), (404, "has no models/"), (418, "418")]
)
def test_a_hub_that_refuses(machine: Machine, hub: Hub, status: int, fact: str) -> None:
    hub.status = status
    says(network.hub(host(machine, hub)), FAILED, fact)


def test_a_hub_that_may_not_be_asked(machine: Machine, hub: Hub) -> None:
    says(network.hub(host(machine, hub, HF_HUB_OFFLINE="1")), FAILED, "HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE")
    assert hub.asked == []


def test_credentials_in_the_endpoint_are_not_told(machine: Machine, hub: Hub) -> None:
    hub.url = hub.url.replace("//", "//somebody:password1@")
    assert "password1" not in network.hub(host(machine, hub)).fact
    hub.url = "http://somebody:password1@127.0.0.1:9"
    assert "password1" not in network.hub(host(machine, hub)).fact


def test_without_a_gated_repository_no_token_is_needed_or_sent(machine: Machine, hub: Hub) -> None:
    says(network.token(host(machine, hub)), OK, "no token; none is needed")
    says(network.token(host(machine, hub, HF_TOKEN=TOKEN)), OK, "a token is there; none is needed")
    assert not any(authorization for _, authorization in hub.asked)


def test_a_gated_repository_needs_a_token_that_it_takes(machine: Machine, hub: Hub) -> None:
    hub.gated = (MODEL,)
    none = network.token(host(machine, hub))
    says(none, FAILED, f"{MODEL} is gated and there is no token", ".venv/bin/hf auth login")
    says(network.token(host(machine, hub, HF_TOKEN=TOKEN)), OK, f"{MODEL} takes it")
    refused = network.token(host(machine, hub, HF_TOKEN=STRANGER))
    says(refused, FAILED, "the token is not let in", f"accept the terms: {hub.url}/")
    unknown = network.token(host(machine, hub, HF_TOKEN="hf_mistyped"))
    says(unknown, FAILED, "does not know the token", "unset HF_TOKEN && .venv/bin/hf auth login")
    assert STRANGER not in refused.fact + refused.fix and "mistyped" not in unknown.fact + unknown.fix


def test_a_hub_that_does_not_say_who_is_let_in(machine: Machine, hub: Hub) -> None:
    hub.gated, hub.status = (MODEL,), 503
    with pytest.raises(NotChecked, match="does not say whether the token is let in"):
        network.token(host(machine, hub, HF_TOKEN=TOKEN))


def test_a_private_repository_needs_a_token_too(machine: Machine, hub: Hub) -> None:
    hub.private = (MODEL,)
    says(network.token(host(machine, hub)), FAILED, "no token", "hf auth login")
    says(network.token(host(machine, hub, HF_TOKEN=TOKEN)), OK, "takes it")


@pytest.mark.parametrize("place", ["HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME", ""])
def test_the_token_is_found_where_the_hub_keeps_it(machine: Machine, hub: Hub, place: str) -> None:
    hub.gated = (MODEL,)
    folder = {"HF_TOKEN_PATH": "x", "HF_HOME": "x", "XDG_CACHE_HOME": "x/huggingface", "": ".cache/huggingface"}[place]
    file = machine.file(f"{folder}/token", f"{TOKEN}\n")
    value = str(file if place == "HF_TOKEN_PATH" else machine.root / "x")
    says(network.token(host(machine, hub, **({place: value} if place else {}))), OK, "takes it")


def test_without_the_hub_a_token_is_not_judged(machine: Machine) -> None:
    with pytest.raises(NotChecked, match="a token is there; the hub did not answer, see hub"):
        network.token(host(machine, Hub("http://127.0.0.1:9"), HF_TOKEN=TOKEN))


@pytest.mark.parametrize(("ahead_s", "status"), [(0, OK), (100, WARNING), (-100, WARNING), (3600, FAILED)])
def test_the_clock_is_compared_with_the_hubs(machine: Machine, hub: Hub, ahead_s: float, status: str) -> None:
    hub.ahead_s = -ahead_s
    fact = "within" if status == OK else "ahead of" if ahead_s > 0 else "behind"
    says(network.clock(host(machine, hub)), status, fact, "" if status == OK else "set-ntp true")


def test_without_the_hub_the_clock_is_asked_of_the_system(machine: Machine) -> None:
    away = Hub("http://127.0.0.1:9")
    with pytest.raises(NotChecked, match="neither the hub"):
        network.clock(host(machine, away))
    machine.program("chronyc", 'echo "Leap status     : Normal"')
    says(network.clock(host(machine, away)), OK, "chronyc")
    machine.program("chronyc", 'echo "Leap status     : Not synchronised"')
    says(network.clock(host(machine, away)), WARNING, "chronyc", "makestep")
    machine.program("timedatectl", "echo yes")
    says(network.clock(host(machine, away)), OK, "timedatectl")
    machine.program("timedatectl", "echo no")
    says(network.clock(host(machine, away)), WARNING, "timedatectl", "set-ntp")
