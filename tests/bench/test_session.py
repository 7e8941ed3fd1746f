"""v4forge.bench.session: which server is measured, which one is started for it and with which key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import certified_artifact
import pytest
from keeper_stand_in import Noted, in_variables, install, steps, wanted, words

from v4forge.bench import served_model
from v4forge.bench.served_model import Target
from v4forge.bench.session import Session
from v4forge.errors import UserError
from v4forge.serving import launch
from v4forge.serving.deployment import Deployment
from v4forge.serving.launch import Start, Wanted

KEY = "open-sesame"


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    monkeypatch.setattr(served_model, "look", lambda url, key, *_, **__: Target(url, "m", [], {}, key))
    return install(monkeypatch)


def session(own: Wanted, url: str = "", **more: Any) -> Session:
    return Session("speed", own.folder.with_name("reports"), url, own, Start(), steps, **more)


def started(own: Wanted, key: str = "") -> Deployment:
    return launch.up(launch.deployment_of(own), key, Start(), steps)


def test_servers_of_a_bench_live_one_after_the_other_beside_the_folder_each_with_the_key(
    tmp_path: Path, noted: list[Noted]
) -> None:
    bench = session(wanted(tmp_path), keys=KEY)
    for drafts in (0, 2):
        with bench.served(wanted(tmp_path, drafts=drafts)) as at:
            assert at.key == KEY and words(noted)[-1] == "start"
    assert words(noted) == ["write", "start", "stop"] * 2
    assert {each.deployment.folder for each in noted} == {str(tmp_path / "serve-bench")}
    assert [each.deployment.serving.drafts for each in noted if each.word == "start"] == [0, 2]
    assert {each.key for each in noted} == {KEY} and not in_variables(KEY, noted)
    assert KEY not in repr(bench)


def test_a_server_is_stopped_when_its_measurement_fails(tmp_path: Path, noted: list[Noted]) -> None:
    with pytest.raises(UserError, match="gone"), session(wanted(tmp_path)).served():
        raise UserError("gone", "")
    assert words(noted) == ["write", "start", "stop"]


def test_what_a_killed_bench_has_left_is_stopped_first(tmp_path: Path, noted: list[Noted]) -> None:
    started(wanted(tmp_path, folder=tmp_path / "serve-bench", drafts=3))
    with session(wanted(tmp_path)).served():
        assert words(noted) == ["write", "start", "stop", "write", "start"]


def test_what_runs_is_measured_with_its_own_key_and_goes_on(tmp_path: Path, noted: list[Noted]) -> None:
    started(wanted(tmp_path, port=9000), KEY)
    bench = session(wanted(tmp_path))
    with bench.served() as at:
        assert (at.url, at.key) == ("http://127.0.0.1:9000", KEY)
    own = bench.served(wanted(tmp_path, drafts=0))
    with pytest.raises(UserError, match="this bench starts its own servers, and one runs already"), own:
        raise AssertionError("nothing is to be measured")
    assert Deployment.load(tmp_path / "serve") and words(noted) == ["write", "start"]


def test_an_address_is_asked_with_the_key_and_nothing_is_started(tmp_path: Path, noted: list[Noted]) -> None:
    with session(wanted(tmp_path), "http://127.0.0.1:1", keys=KEY).served() as at:
        assert (at.url, at.key) == ("http://127.0.0.1:1", KEY)
    assert noted == []


def test_programs_are_where_the_measured_deployment_has_them_unless_the_user_says_where(
    tmp_path: Path, noted: list[Noted]
) -> None:
    on_the_host, elsewhere = wanted(tmp_path), wanted(tmp_path, program="/opt/bin")
    in_docker = Wanted(tmp_path / "serve", tmp_path / "artifact")
    assert session(on_the_host).programs() == tmp_path / "bin"
    assert session(in_docker).programs() is None
    started(on_the_host)
    assert session(in_docker).programs() == tmp_path / "bin"
    assert session(elsewhere).programs() == Path("/opt/bin")


def test_a_server_whose_artifact_is_no_longer_the_certified_one_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = certified_artifact.write(tmp_path / "work")

    def look(url: str, *_: object) -> Target:
        return Target(url, "m", [], {"artifact": served_model.artifact_facts(artifact)})

    monkeypatch.setattr(served_model, "look", look)
    with session(wanted(tmp_path), "http://somewhere:1").served():
        pass
    (artifact / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002"), session(wanted(tmp_path), "http://somewhere:1").served():
        pass
    allowed = Session("speed", tmp_path, "http://somewhere:1", wanted(tmp_path), Start(allow=["certificate"]), steps)
    with allowed.served():
        pass
