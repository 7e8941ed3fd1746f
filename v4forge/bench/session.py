"""A run of a bench: the server that it measures, started where none is, and the result file that it adds to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from v4forge import artifact_folder
from v4forge.bench import results, served_model
from v4forge.bench.results import Measurement
from v4forge.bench.served_model import Target
from v4forge.errors import UserError
from v4forge.serving import keys, launch
from v4forge.serving.deployment import Deployment
from v4forge.serving.launch import Start, Steps, Wanted, say


@dataclass(frozen=True)
class Session:
    """What every bench is asked: `bench` is its name, `reports` where results go, `limit` the size of a trial.

    `url` is measured if there is one, or else the deployment that runs in `folder`, or else `wanted`, which is started
    as `start` says. `keys` are what clients may send, as a file of them, "" for none or for the running deployment's
    own; `artifact` is what the user says that is served, `model` which of several models. `command` is for people to
    repeat.
    """

    bench: str
    reports: Path
    url: str
    wanted: Wanted
    start: Start
    steps: Steps
    keys: str = field(default="", repr=False)
    artifact: Path | None = None
    model: str = ""
    limit: int | None = None
    fresh: bool = False
    seed: int = 42
    command: str = ""

    @property
    def folder(self) -> Path:
        """Of a deployment of make serve, which is measured if it runs."""
        return self.wanted.folder

    @property
    def key(self) -> str:
        """The one that requests are made with."""
        return keys.own(self.keys)

    def check_stopped(self) -> None:
        """Raises UserError while a deployment runs, of whose GPUs a bench's own servers would take memory."""
        if Deployment.load(self.folder):
            fact = f"this bench starts its own servers, and one runs already from {self.folder}"
            raise UserError(fact, "make serve-stop, then again; or measure that one: --url URL")

    def programs(self) -> Path | None:
        """The folder of vllm's and lm-eval's programs on this machine, None where they are in the serving image: as the
        deployment runs that is measured, unless the user says where."""
        running = Deployment.load(self.folder)
        if running and not (self.wanted.runtime or self.wanted.program):
            return Path(running.program) if running.runtime == "host" else None
        return None if self.wanted.keeper == "docker" else self.wanted.programs

    @contextmanager
    def served(self, own: Wanted | None = None) -> Iterator[Target]:
        """What is measured. What this starts, in a folder beside `folder`, lives as long as the block.

        own: what this bench has decided to serve, without drafts say. It always starts that then, and a running
        deployment is an error. Raises UserError where nothing can be measured.
        """
        if own:
            self.check_stopped()
        if self.url:
            yield self._whole(served_model.look(self.url, self.key, self.folder, self._given_artifact(), self.model))
            return
        if running := Deployment.load(self.folder):
            yield self._whole(served_model.look(running.url, self.key or running.key, self.folder, model=self.model))
            return
        folder = self.folder.with_name(f"{self.folder.name}-bench")
        if Deployment.left(folder):  # of a bench that was killed
            launch.stop(folder)
        deployment = launch.deployment_of(replace(own or self.wanted, folder=folder))
        launch.up(deployment, self.keys, self.start, self.steps)
        try:
            yield served_model.look(deployment.url, self.key, folder)
        finally:
            launch.stop(folder)

    def _whole(self, target: Target) -> Target:
        """The target. Raises UserError where its artifact is no longer what was certified, whose name results bear."""
        told = target.facts.get("artifact") or {}
        if told.get("certificate") == "changed" and "certificate" not in self.start.allow:
            artifact_folder.check(Path(told["folder"]), "make verify")
        return target

    def _given_artifact(self) -> Path | None:
        """The artifact that the user named, where it is here: a server elsewhere may serve the same."""
        return self.artifact if self.artifact and (self.artifact / "config.json").is_file() else None

    def begin(
        self,
        at: Target | Mapping[str, Any],
        settings: Mapping[str, Any],
        sampling: Mapping[str, Any],
        hashes: Mapping[str, str],
        versions: Mapping[str, Any] | None = None,
    ) -> Measurement:
        """The result file to add to. at: the target, or its facts; versions: of further programs that measure."""
        about = at.facts if isinstance(at, Target) else dict(at)
        facts = {
            "target": about,
            "machine": served_model.machine(),
            "versions": {**served_model.versions(about), **(versions or {})},
            "settings": dict(settings),
            "sampling": dict(sampling),
            "seed": self.seed,
            "hashes": dict(hashes),
        }
        opened = results.begin(self.reports, self.bench, facts, self.limit, self.fresh, self.command)
        if done := len(opened.content["parts"]):
            say(f"{self.bench}: continuing {opened.path}, {done} parts are there")
        return opened


def conclude(opened: Measurement) -> int:
    """Ends a bench: the file, what failed; the exit code."""
    complete = opened.finish()
    for key, failure in opened.content["failures"].items():
        say(f"not measured: {key}: {failure['fact']}\n  hint: {failure['hint']}")
    trial = opened.content["trial"]
    note = f", a trial of {trial}: no result" if trial is not None else ""
    say(f"{opened.content['bench']}: {opened.path}{note}")
    return 0 if complete else 1
