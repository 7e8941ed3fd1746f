"""v4forge.serving.launch: what is started, with which key, and what is stopped, without any process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from keeper_stand_in import Keeper, Noted, in_variables, install, steps, wanted, words

from v4forge.errors import UserError
from v4forge.outcomes import FAILED, Outcome
from v4forge.serving import keys, launch, probe, readiness, rolling
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import Deployment, Runtime
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
    deployment = launch.up(launch.deployment_of(wanted(tmp_path)), keys.read(""), Start(), steps)
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


# What vLLM ends with where the KV cache is too small, and what it says of one that is not.
TOO_LONG = (
    "replica0 has ended: ValueError: To serve at least one request with the model's max seq len (65536), 3.91 GiB KV"
    " cache is needed, which is larger than the available KV cache memory (1.20 GiB). Based on the available memory,"
    " the estimated maximum model length is 20113. Try increasing `gpu_memory_utilization`"
)
KEPT = "INFO 12-01 [kv_cache_utils.py:2327] GPU KV cache size: 20,224 tokens, Maximum concurrency for 19,968 tokens"


def gpus_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each start's context was, of a machine on which 20,113 tokens fit."""
    contexts: list[str] = []

    def wait(runtime: Runtime, *_: object) -> None:
        contexts.append(str(runtime.deployment.serving.max_model_len))
        if int(contexts[-1]) > 20113:
            raise UserError(TOO_LONG, "make serve-logs")

    monkeypatch.setattr(readiness, "wait", wait)
    monkeypatch.setattr(Keeper, "log", lambda *_: KEPT)
    return contexts


def test_a_context_that_does_not_fit_becomes_the_one_that_does(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contexts = gpus_of(monkeypatch)
    asked = Deployment(str(tmp_path / "serve"), str(tmp_path), "docker", profile="production", gpus=[["0", "1"]])
    served = launch.up(asked, "", Start(), steps)
    assert contexts == ["65536", "19968"] and words(noted) == ["write", "start", "stop", "write", "start"]
    said = capsys.readouterr().out.splitlines()
    assert "serve: a context of 65,536 tokens does not fit on these GPUs, 19,968 do: once more" in said
    name = "deepseek-v4-flash-w4a16"
    assert said[-1] == f"ready: {asked.url}, {name}, context 19,968, k=3, 20,224 KV tokens a replica, 1 replica"
    again = launch.up(asked, "", Start(), steps)  # what runs is what was asked for
    assert again.context == served.context == 19968 and again.differing(served) == []


@pytest.mark.parametrize(
    "changes", [{"profile": "throughput"}, {"profile": "production", "overrides": {"max-model-len": "32768"}}]
)
def test_a_context_that_was_chosen_is_not_another(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    contexts = gpus_of(monkeypatch)
    asked = Deployment(str(tmp_path / "serve"), str(tmp_path), "docker", gpus=[["0", "1"]], **changes)
    with pytest.raises(UserError, match="the estimated maximum model length is 20113"):
        launch.up(asked, "", Start(), steps)
    assert len(contexts) == 1 and words(noted)[-1] == "stop"


@pytest.mark.parametrize("keep", [False, True])
def test_what_fails_its_probe_is_stopped_unless_it_is_to_be_kept(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    monkeypatch.setattr(probe, "probe", lambda *_: [Outcome("replica 0: tool call", FAILED, "none was made")])
    deployment = launch.deployment_of(wanted(tmp_path))
    with pytest.raises(UserError, match="the probe failed: replica 0: tool call: none was made") as error:
        launch.up(deployment, KEY, Start(keep=keep), steps)
    assert error.value.hint.endswith("make serve ALLOW=tool-call")
    assert (words(noted)[-1] == "stop") is not keep and (tmp_path / "serve/keys/api_key").exists() is keep
    launch.stop(tmp_path / "serve")
    launch.up(deployment, KEY, Start(allow=["tool-call"]), steps)


def test_what_was_started_does_not_stay_behind_an_error_of_ours(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "probe", lambda *_: [][0])
    with pytest.raises(IndexError):
        launch.up(launch.deployment_of(wanted(tmp_path)), "", Start(), steps)
    assert words(noted)[-1] == "stop"


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": 3}, "other replicas run already, with another gpus"),
        ({"bind": "127.0.0.2"}, "other replicas run already, with another bind"),
        ({"overrides": {"served-model-name": "mine"}}, "the replicas serve .*, and clients would ask mine of both"),
    ],
)
def test_what_all_replicas_or_the_router_have_does_not_change_while_they_run(
    tmp_path: Path, noted: list[Noted], change: dict[str, Any], message: str
) -> None:
    launch.up(launch.deployment_of(wanted(tmp_path)), "", Start(), steps)
    with pytest.raises(UserError, match=message):
        launch.up(launch.deployment_of(wanted(tmp_path, **change)), "", Start(), steps)
    assert words(noted) == ["write", "start"]


def test_the_context_that_was_found_to_fit_stays_where_a_setting_changes(
    tmp_path: Path, noted: list[Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Deployment] = []
    monkeypatch.setattr(rolling.Roll, "run", lambda _self, _before, after: made.append(after))
    monkeypatch.setattr(readiness, "wait", lambda *_: None)
    asked = Deployment(str(tmp_path / "serve"), str(tmp_path), "docker", profile="production", gpus=[["0", "1"]])
    launch.up(replace(asked, context=19968), "", Start(), steps)
    launch.up(replace(asked, overrides={"max-num-seqs": "8"}), "", Start(), steps)
    launch.up(replace(asked, profile="throughput"), "", Start(), steps)
    assert [each.serving.max_model_len for each in made] == [19968, 32768]
