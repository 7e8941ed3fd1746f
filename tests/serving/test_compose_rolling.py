"""What docker compose is asked when replicas run already: by name, so that none is replaced that was not meant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import docker_stand_in
import pytest
from keeper_stand_in import steps

from v4forge.errors import UserError
from v4forge.images import definitions
from v4forge.serving import compose, launch, preflight, probe, readiness, rolling
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import Deployment, Process
from v4forge.serving.launch import Start

RUNS = Process("running", "1")


@pytest.fixture
def kept(tmp_path: Path) -> Deployment:
    (tmp_path / "artifact").mkdir()
    gpus = [["0", "1"], ["2", "3"]]
    return Deployment(str(tmp_path / "serve"), str(tmp_path / "artifact"), "docker", gpus=gpus, image="serve:local")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of compose that start something, without its files and profiles. Limits cannot be raised."""
    found: list[list[str]] = []

    def run(self: Compose, *words: str) -> None:
        if words[0] == "up":
            found.append([*words, f"image={self.variables()['SERVE_IMAGE']}"])
            if compose.LIMITS in self.files:
                raise UserError("docker failed: error setting rlimit type 8", "")

    monkeypatch.setattr(Compose, "_run", run)
    return found


def states(monkeypatch: pytest.MonkeyPatch, **found: Process) -> None:
    def processes(self: Compose) -> Mapping[str, Process]:
        return dict.fromkeys((*self.deployment.names, "router"), Process()) | found

    monkeypatch.setattr(Compose, "processes", processes)


def test_a_start_beside_what_runs_names_what_does_not(
    kept: Deployment, told: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    states(monkeypatch)
    Compose(kept).start()
    assert told[-1] == ["up", "--detach", "--no-build", "--remove-orphans", "image=serve:local"]
    states(monkeypatch, replica0=RUNS, router=RUNS, replica1=Process("exited", "1"))
    Compose(kept).start()
    assert told[-1] == ["up", "--detach", "--no-build", "--no-deps", "replica1", "image=serve:local"]
    told.clear()
    states(monkeypatch, replica0=RUNS, router=RUNS, replica1=RUNS)
    Compose(kept).start()
    assert told == []


def test_one_replica_is_replaced_by_its_image_of_then_whatever_has_its_name_now(
    kept: Deployment, told: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def docker(*words: str) -> str:
        asked.append(words)
        return "c0ffee\n" if "label=com.docker.compose.service=replica1" in words[-1] else ""

    monkeypatch.setattr(compose, "_told", docker)
    Compose(replace(kept, image_id="sha256:1")).replace("replica1")
    assert [words for words in asked if words[0] != "ps"] == [
        ("stop", "-t", "60", "c0ffee"),
        ("rm", "--force", "c0ffee"),
    ]
    assert told[-1] == ["up", "--detach", "--no-build", "--no-deps", "replica1", "image=sha256:1"]


def test_an_image_is_another_by_what_it_is_and_not_by_its_name(
    kept: Deployment, told: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    states(monkeypatch, replica0=RUNS, router=RUNS, replica1=RUNS)
    monkeypatch.setattr(preflight, "check", lambda *_: None)
    monkeypatch.setattr(readiness, "wait", lambda *_: None)
    monkeypatch.setattr(probe, "probe", lambda *_: [])
    monkeypatch.setattr(Compose, "check", lambda _self: None)
    monkeypatch.setattr(Compose, "log", lambda _self, _name: "")
    rolled: list[str] = []
    monkeypatch.setattr(rolling.Roll, "run", lambda _self, _before, after: rolled.append(after.image_id))
    labels = definitions.expected_labels("serve")
    with docker_stand_in.running(docker_stand_in.Daemon()) as daemon:
        monkeypatch.setenv("DOCKER_HOST", daemon.url)
        daemon.images |= {"serve:local": labels, "serve:again": labels}
        launch.up(kept, "", Start(), steps)
        launch.up(replace(kept, image="serve:again"), "", Start(), steps)  # another name of the same
        assert told == [] and rolled == []
        daemon.ids["serve:local"] = "sha256:1"
        launch.up(kept, "", Start(), steps)
        assert rolled == ["sha256:1"]
