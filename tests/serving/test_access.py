"""Who gets in, as `make serve` sets it up: keys, the guard of an open endpoint, TLS; without any process."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from keeper_stand_in import Noted, install, steps, wanted, words
from tls import Authority

from v4forge.errors import UserError
from v4forge.serving import compose, keys, launch, preflight, router_control, secret_files
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import CERTIFICATE, CONFIGURATION, KEYS, USER, Deployment
from v4forge.serving.launch import Start
from v4forge.serving.supervisord import Supervised

TWO = "ann:open\nbob:sesame:60"


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    return install(monkeypatch)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def deployment(folder: Path, **changes: Any) -> Deployment:
    return Deployment(**{"folder": str(folder), "artifact": "/a/artifact", "runtime": "host"} | changes)


# --- keys


def test_keys_are_taken_from_a_file_or_the_environment_and_kept_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "sesame")
    assert keys.read("") == "sesame" and "API_KEY" not in os.environ
    (tmp_path / "mine").write_text(TWO + "\n")
    assert keys.read(str(tmp_path / "mine")) == TWO
    (tmp_path / "empty").write_text("\n# none\n")
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    (tmp_path / "wrong").write_text("ann:open\nbob sesame\n")
    for name, fact in (("empty", "no key in"), ("bytes", "no text"), ("wrong", "line 2 of"), ("missing", "No such")):
        with pytest.raises(UserError, match=fact) as error:
            keys.read(str(tmp_path / name))
        assert "sesame" not in error.value.fact and error.value.hint.endswith("make serve API_KEY_FILE=<file>")


@pytest.mark.parametrize(
    ("text", "key"), [("", ""), ("sesame", "sesame"), (TWO, "open"), ("a:x:6\nb:y", "y"), ("a:x:6\nb:y:9", "x")]
)
def test_we_ask_with_a_key_without_a_limit_where_there_is_one(text: str, key: str) -> None:
    assert keys.own(text) == key


def test_a_replica_is_told_where_the_keys_are_and_nothing_where_none_are_asked_for(tmp_path: Path) -> None:
    file = str(tmp_path / KEYS)
    for runtime, place in (("host", file), ("docker", "/keys/api_key")):
        given = deployment(tmp_path, runtime=runtime, key_file=file, gpus=[["0"], ["1"]]).variables(1)
        assert given["API_KEY_FILE"] == place and given["REPLICAS"] == "2"
        given = deployment(tmp_path, runtime=runtime).variables(0)
        assert given["API_KEY_FILE"] == ""  # whatever this environment has


def test_only_who_serves_may_read_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, user, group: given.append((Path(path).name[:5], user, group)))
    old = os.umask(0)
    try:
        secret_files.write(tmp_path / KEYS, "sesame\n", USER)
    finally:
        os.umask(old)
    assert (tmp_path / KEYS).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / KEYS).parent.stat().st_mode & 0o777 == 0o700
    assert given == [(".api_", USER, USER), ("keys", USER, USER)]  # before it has its name
    monkeypatch.setattr(os, "getuid", lambda: 0)
    owners = [deployment(tmp_path, runtime=runtime).owner for runtime in ("docker", "host")]
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert [*owners, deployment(tmp_path, runtime="docker").owner] == [USER, None, None]


def test_keys_are_changed_while_it_runs_and_never_taken_away(
    tmp_path: Path, noted: list[Noted], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "serve"
    running = launch.up(launch.deployment_of(wanted(tmp_path)), "sesame", Start(), steps)
    launch.reload(folder, TWO)
    assert (folder / KEYS).read_text() == TWO + "\n" and running.key == "open" and words(noted) == ["write", "start"]
    assert capsys.readouterr().out.endswith("serve: the keys are those of the file, from the next second on\n")
    with pytest.raises(UserError, match="there is nothing to read anew"):
        launch.reload(folder, "")
    with pytest.raises(UserError, match="with another key") as error:
        launch.up(launch.deployment_of(wanted(tmp_path)), "sesame", Start(), steps)
    assert error.value.hint == "make serve-reload API_KEY_FILE=<file>"
    (folder / KEYS).unlink()
    assert running.key == ""  # of which nothing ends in a traceback
    launch.stop(folder)
    launch.up(launch.deployment_of(wanted(tmp_path)), "", Start(), steps)
    with pytest.raises(UserError, match="the replicas were started without a key"):
        launch.reload(folder, TWO)


# --- an endpoint that others reach


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "192.0.2.7", "serve.example", "127.0.0.1.example", ""])
def test_an_endpoint_that_others_reach_is_refused_without_a_key(tmp_path: Path, bind: str) -> None:
    with pytest.raises(UserError) as error:
        preflight.check_open(deployment(tmp_path, bind=bind))
    assert error.value.fact == f"the endpoint would listen on {bind} and ask nobody for a key"
    assert error.value.hint == f"make serve BIND={bind} API_KEY_FILE=<file>, or ALLOW=open"
    preflight.check_open(deployment(tmp_path, bind=bind, key_file=str(tmp_path / KEYS)))
    assert "open" in [guard.name for guard in preflight.GUARDS]


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_may_ask_without_one(tmp_path: Path, bind: str) -> None:
    preflight.check_open(deployment(tmp_path, bind=bind))


# --- TLS


def test_a_certificate_and_its_key_become_the_one_file_that_the_router_reads(
    tmp_path: Path, authority: Authority
) -> None:
    cert, key = authority.issue(tmp_path)
    both = tmp_path / "both.pem"
    both.write_text(cert.read_text() + key.read_text())
    assert secret_files.certificate(str(cert), str(key)) == both.read_text()
    assert secret_files.certificate(str(both), "") == both.read_text()


@pytest.mark.parametrize("fault", ["another key", "no key", "passphrase", "no certificate", "missing", "bytes"])
def test_what_is_no_certificate_with_its_key_is_refused(tmp_path: Path, authority: Authority, fault: str) -> None:
    (tmp_path / "other").mkdir()
    cert, key = authority.issue(tmp_path, passphrase=b"sesame" if fault == "passphrase" else b"")
    _, other = authority.issue(tmp_path / "other")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    chosen = {
        "another key": (cert, other),
        "no key": (cert, ""),
        "passphrase": (cert, key),
        "no certificate": (key, ""),
        "missing": (tmp_path / "x", key),
        "bytes": (tmp_path / "bytes", key),
    }
    with pytest.raises(UserError) as error:
        secret_files.certificate(*map(str, chosen[fault]))
    assert "PRIVATE" not in error.value.fact and error.value.hint.startswith("make serve CERT=")


def test_the_router_speaks_tls_with_the_deployments_file_and_a_new_one_is_read_without_a_stop(
    tmp_path: Path, noted: list[Noted], authority: Authority
) -> None:
    cert, key = authority.issue(tmp_path)
    asked = launch.deployment_of(wanted(tmp_path, cert=str(cert), cert_key=str(key)))
    running = launch.up(asked, "", Start(), steps)
    folder = tmp_path / "serve"
    assert running.url == "https://127.0.0.1:8000" and running.admin_url.startswith("http://")
    before = (folder / CERTIFICATE).read_text()
    assert (folder / CERTIFICATE).stat().st_mode & 0o777 == 0o600
    assert f'ssl crt "{folder / CERTIFICATE}"' in (folder / CONFIGURATION).read_text()
    authority.issue(tmp_path)
    launch.reload(folder, "")
    assert (folder / CERTIFICATE).read_text() == cert.read_text() + key.read_text() != before
    assert words(noted) == ["write", "start", "reload"]
    launch.stop(folder)
    assert not (folder / CERTIFICATE).exists()


def test_the_router_is_told_to_read_anew_by_whoever_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, ...]] = []
    running = ["c0ffee\n"]

    def docker(*words: str) -> str:
        told.append(words)
        return "".join(running)

    processes = count(7)
    monkeypatch.setattr(compose, "_told", docker)
    monkeypatch.setattr(router_control, "told", lambda *_: f"Name: HAProxy\nPid: {next(processes)}\nCurrConns: 0\n")
    runtime = Compose(deployment(tmp_path, runtime="docker"))
    runtime.reload()
    assert told[-1] == ("kill", "--signal=USR2", "c0ffee")
    running.clear()
    for each in (runtime, Supervised(deployment(tmp_path))):  # neither runs
        with pytest.raises(UserError, match="the router does not run"):
            each.reload()


def test_without_a_certificate_nothing_of_it_is_in_the_configuration(tmp_path: Path) -> None:
    assert "ssl" not in deployment(tmp_path).router_configuration()
    docker = deployment(tmp_path, runtime="docker", cert="/mine/cert.pem").router_configuration()
    assert 'ssl crt "/tls/endpoint.pem"' in docker and "/mine" not in docker
