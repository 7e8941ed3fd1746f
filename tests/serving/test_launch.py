"""v4forge.serving.launch: what is started, with which key, and what is stopped, without any process."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from keeper_stand_in import Noted, in_variables, install, steps, wanted, words

from v4forge.errors import UserError
from v4forge.outcomes import FAILED, Outcome
from v4forge.serving import launch, probe, readiness
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import Deployment
from v4forge.serving.launch import Start
from v4forge.serving.supervisord import Supervised

KEY = "open-sesame"


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    return install(monkeypatch)


def test_a_key_reaches_what_is_started_by_its_file_and_never_by_the_environment(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", KEY)
    deployment = launch.up(launch.deployment_of(wanted(tmp_path)), launch.read_key(""), Start(), steps)
    assert words(noted) == ["write", "start"] and {each.key for each in noted} == {KEY}
    assert not in_variables(KEY, noted)
    assert Path(deployment.key_file).stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/sbin/{name}")
    assert KEY not in Supervised(deployment).configuration()
    assert KEY not in " ".join(Compose(deployment).variables().values())
    launch.stop(tmp_path / "serve")
    assert not Path(deployment.key_file).exists() and not Deployment.load(tmp_path / "serve")


def test_what_runs_is_not_started_as_something_else(tmp_path: Path, noted: list[Noted]) -> None:
    deployment = launch.deployment_of(wanted(tmp_path))
    launch.up(deployment, "", Start(), steps)
    with pytest.raises(UserError, match="other replicas run already, with another key"):
        launch.up(deployment, KEY, Start(), steps)
    with pytest.raises(UserError, match="other replicas run already, with another port"):
        launch.up(launch.deployment_of(wanted(tmp_path, port=9000)), "", Start(), steps)
    assert launch.up(deployment, "", Start(), steps) == deployment
    assert words(noted) == ["write", "start", "start"]


@pytest.mark.parametrize("keep", [False, True])
def test_what_fails_its_probe_is_stopped_unless_it_is_to_be_kept(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    monkeypatch.setattr(probe, "probe", lambda *_: [Outcome("replica 0: tool call", FAILED, "none was made")])
    deployment = launch.deployment_of(wanted(tmp_path))
    with pytest.raises(UserError, match="the probe failed: replica 0: tool call: none was made") as error:
        launch.up(deployment, KEY, Start(keep=keep), steps)
    assert error.value.hint.endswith("make serve ALLOW=tool-call")
    assert (words(noted)[-1] == "stop") is not keep and (tmp_path / "serve/api_key").exists() is keep
    launch.stop(tmp_path / "serve")
    launch.up(deployment, KEY, Start(allow=["tool-call"]), steps)


def test_a_replica_that_does_not_answer_is_given_no_time_to_finish(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.up(launch.deployment_of(wanted(tmp_path, replicas=2)), "", Start(), steps)
    monkeypatch.setattr(readiness, "ready", lambda _deployment, number: number == 0)
    launch.stop(tmp_path / "serve")
    assert words(noted)[-1] == "stop replica1"


def test_stopping_where_nothing_runs_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch.stop(tmp_path)
    assert capsys.readouterr().out == f"nothing is served from {tmp_path}\n"
    with pytest.raises(UserError, match="nothing is served from"):
        launch.running_in(tmp_path)


def test_a_container_is_given_no_links_that_lead_out_of_what_it_sees(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact/inside").symlink_to("config.json")
    (tmp_path / "artifact/config.json").write_text("{}")
    (tmp_path / "here").symlink_to("artifact")
    there = Compose(launch.deployment_of(wanted(tmp_path, artifact=tmp_path / "here")))
    there.check_readable()
    (tmp_path / "artifact/.gone").symlink_to("nowhere")
    there.check_readable()
    (tmp_path / "artifact/model.safetensors").symlink_to("../blob")
    with pytest.raises(UserError, match=r"model\.safetensors is a link to .*/blob, which containers do not see"):
        there.check_readable()
