"""A keeper of deployments that starts nothing, for tests of what is started, with which key, and what is stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from v4forge.serving import launch, preflight, probe, readiness
from v4forge.serving.deployment import Deployment, Process
from v4forge.serving.launch import Wanted


@dataclass(frozen=True)
class Noted:
    """What a keeper was asked, with the key in the deployment's file and the variables of that moment."""

    word: str
    deployment: Deployment
    key: str
    variables: Mapping[str, str]


class Keeper:
    """A Runtime that only notes."""

    def __init__(self, deployment: Deployment, noted: list[Noted]) -> None:
        self.deployment = deployment
        self.noted = noted

    def note(self, word: str) -> None:
        self.noted.append(Noted(word, self.deployment, self.deployment.key, dict(os.environ)))

    def check(self) -> None: ...

    def write(self) -> None:
        self.note("write")

    def start(self) -> None:
        self.note("start")

    def processes(self) -> Mapping[str, Process]:
        return {}

    def log(self, name: str) -> str:
        return ""

    def follow(self, names: Sequence[str], lines: int) -> None: ...

    def reload(self) -> None:
        self.note("reload")

    def stop(self, say: object, silent: Sequence[str] = ()) -> None:
        self.note(" ".join(["stop", *silent]))


def install(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    """Everything is kept by it, and every start succeeds -> what it was asked, in order."""
    noted: list[Noted] = []
    monkeypatch.setattr(launch, "runtime_of", lambda deployment: Keeper(deployment, noted))
    monkeypatch.setattr(preflight, "check", lambda *_: None)
    monkeypatch.setattr(readiness, "wait", lambda *_: None)
    monkeypatch.setattr(readiness, "ready", lambda *_: True)
    monkeypatch.setattr(readiness, "show_errors", lambda *_: None)
    monkeypatch.setattr(probe, "probe", lambda *_: [])
    return noted


def words(noted: Sequence[Noted]) -> list[str]:
    return [each.word for each in noted]


def in_variables(text: str, noted: Sequence[Noted]) -> bool:
    return any(text in value for each in noted for value in each.variables.values())


@contextmanager
def steps(what: str, total: int, unit: str = "", resumes: bool = False) -> Iterator[Callable[[int, str], None]]:
    """No progress is shown."""
    yield lambda _done, _doing: None


def wanted(work: Path, **changes: Any) -> Wanted:
    """A deployment on the CPU, with a program that is there."""
    (work / "bin").mkdir(exist_ok=True)
    (work / "bin/vllm").touch()
    given = {"folder": work / "serve", "artifact": work / "artifact", "program": str(work / "bin")}
    return Wanted(**{**given, "backend": "cpu", **changes})
