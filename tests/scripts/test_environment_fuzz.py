"""Whatever the environment holds, a program does its work or ends with a fact and a hint, never with a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import httpx
import pytest
import requests
from doctored import Machine
from hub_stand_in import MAIN
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from programs import run_here

from v4forge import launched, network
from v4forge.errors import UserError
from v4forge.hub import hub_source
from v4forge.pipeline.doctor import checks

NAMES = (
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *(*network.AUTHORITIES, "HF_ENDPOINT", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME"),
    *(launched.MARK, *launched.NUMBERS, "MASTER_ADDR", "PET_NNODES", launched.INTERFACE, "CUDA_VISIBLE_DEVICES"),
    *("COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "TMPDIR", "HOME", "LANG", "TZ", "MAKEFLAGS", "MAKELEVEL"),
    *(
        "V4FORGE_EVENTS",
        "V4FORGE_STAGE",
        "PYTHONPATH",
        "GIT_DIR",
        "DOCKER_HOST",
        "DOCKER_TLS_VERIFY",
        "DOCKER_CERT_PATH",
    ),
)
PIECES = (
    *("", " ", "0", "1", "-1", "2", "99999", "x", "²", "ä", "\n", "…", "%", "@", "me:hunter22@", "{x}", "$(x)"),
    *(
        "http://",
        "https://",
        "socks5://",
        "socks5h://",
        "socks4://",
        "socks://",
        "ftp://",
        "://",
        "/",
        ":",
        ":80",
        "?",
        "#",
    ),
    *("localhost", "127.0.0.1", "[::1]", "[", "]", "fd00::/8", "10.0.0.0/8", "*", ".example.com", ",", "a" * 300),
    *("/nonexistent/ca.pem", os.devnull, "/etc/passwd", "/etc", "/proc/self/mem", "/dev/zero", "tcp://", "unix://"),
)
# The printable half of what a variable may hold; "/" as a folder of logs or caches would be written to.
VALUES = st.lists(st.sampled_from(PIECES), max_size=5).map("".join) | st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=20
)
ENVIRONMENTS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5)
OF_THE_ENVIRONMENT = {"proxies", "certificates", "ranks", "Python variables", "hub", "token", "docker", "hard links"}
common = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def refuse(_self: object, request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("there is no network in this test", request=request)


def refuse_too(*_: object, **__: object) -> requests.Response:
    raise requests.ConnectionError("there is no network in this test")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing leaves this process, and the working folder is its own."""
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", refuse)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", refuse_too)
    monkeypatch.setattr(socket, "getaddrinfo", refuse_too)
    monkeypatch.setattr(hub_source, "RETRIES", 0)
    monkeypatch.setattr(hub_source, "BACKOFF_S", 0.0)
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def held(variables: dict[str, str]) -> Iterator[None]:
    with mock.patch.dict(os.environ, {}), mock.patch.object(tempfile, "tempdir", None):
        for name in NAMES:
            os.environ.pop(name, None)
        os.environ.update(variables)
        yield


def ended(*words: object) -> tuple[int, str]:
    """A program's exit code and what it says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = run_here(str(words[0]), *words[1:])
    return code, said.getvalue()


@common
@given(variables=ENVIRONMENTS)
@example(variables={"ALL_PROXY": "socks5://127.0.0.1:1080"})
@example(variables={"SSL_CERT_FILE": "/nonexistent/ca.pem"})
@example(variables={"NO_PROXY": "localhost,fd00::/8"})
@example(variables={"HF_TOKEN": "ä"})
@example(variables={"HF_HOME": "/dev/null/x"})
def test_fetch_ends_with_a_fact_and_a_hint(no_network: None, tmp_path: Path, variables: dict[str, str]) -> None:
    arguments = ("--out", tmp_path / "upstream", "--repo", "some/model", "--revision", MAIN)
    with held({"V4FORGE_EVENTS": str(tmp_path / "logs/events.jsonl"), **variables}):
        code, said = ended("fetch", *arguments)
    assert code == 1 and "Traceback" not in said and "hunter22" not in said
    assert re.search(r"^error: .+\nhint: .+", said, flags=re.MULTILINE), said


@common
@given(variables=ENVIRONMENTS)
@example(variables={"WORLD_SIZE": "1"})
@example(variables={"COLUMNS": "x", "TERM": "ä"})
def test_status_says_what_there_is(no_network: None, tmp_path: Path, variables: dict[str, str]) -> None:
    with held(variables):
        code, said = ended("status", "--work", tmp_path / "tiny")
    assert code in (0, 1) and "Traceback" not in said


@common
@given(variables=ENVIRONMENTS)
@example(variables={"SSL_CERT_FILE": "/dev/zero"})
@example(variables={"DOCKER_HOST": "tcp://[:x"})
def test_no_check_of_the_doctor_breaks(
    no_network: None, tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str]
) -> None:
    host = Machine(tmp_path_factory.mktemp("machine"), gpus=0).host("tiny", variables)
    with held(variables):
        for check in (check for check in checks.CHECKS if check.name in OF_THE_ENVIRONMENT):
            found = checks.judge(host, check)
            assert "itself broke" not in found.fact, found


@common
@given(variables=ENVIRONMENTS)
def test_a_place_among_ranks_is_one_or_a_fact(variables: dict[str, str]) -> None:
    try:
        place = launched.place(variables)
    except UserError as error:
        assert error.hint
    else:
        assert place is None or place.rank < place.size
    assert isinstance(launched.ignored(variables), str) and launched.rank(variables) >= 0
