"""Real servers for the tests: `make serve BACKEND=cpu`, as its program, on the loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dense
import pytest
from dense import TINY
from programs import run_module

from benchmarks.clients import Outcome, ask_all
from v4forge.serving import deployment
from v4forge.serving.deployment import Plan

ROOT = Path(__file__).resolve().parents[2]
SERVE_ENVIRONMENT = ROOT / ".venv-serve-cpu"
SCHEDULE = "speculative-config.num_speculative_tokens_per_batch_size"


@dataclass(frozen=True)
class Served:
    """A deployment that runs. `said` is what the start printed."""

    folder: Path
    said: str
    key: str = ""

    @property
    def plan(self) -> Plan:
        plan = deployment.load(self.folder)
        assert plan is not None
        return plan

    def program(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return serve(command, "--folder", str(self.folder), *arguments)

    def ask_all(self, requests: list[dict[str, object]], meanwhile: Callable[[], None] | None = None) -> list[Outcome]:
        return ask_all(self.plan.url, requests, self.key, meanwhile)

    def ask(self, request: dict[str, object]) -> Outcome:
        (outcome,) = self.ask_all([request])
        return outcome


def serve(command: str, *arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m scripts.serve`, with an API key in its environment."""
    words = [sys.executable, "-m", "scripts.serve", command, *arguments]
    environment = os.environ | ({"API_KEY": key} if key else {})
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)


def dense_settings() -> list[str]:
    """The options that serve the dense model, and let the probe find what it cannot do."""
    settings = [f"{name}={value}" for name, value in dense.SETTINGS.items()]
    return ["--drafts", "0", "--allow", "certificate", *dense.CANNOT, "--set", *settings]


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row."""
    for first in range(20000 + os.getpid() % 5000, 60000, count):
        with_sockets = [socket.socket() for _ in range(count)]
        try:
            for place, listener in enumerate(with_sockets):
                listener.bind(("127.0.0.1", first + place))
            return first
        except OSError:
            continue
        finally:
            for listener in with_sockets:
                listener.close()
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense.write(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts deployments, and stops them in the end."""
    started: list[Path] = []

    def start(artifact: Path, *arguments: str, key: str = "") -> Served:
        folder = tmp_path_factory.mktemp("serve")
        started.append(folder)
        places = ["--artifact", str(artifact), "--folder", str(folder), "--port", str(free_ports(8))]
        done = serve("up", *places, "--backend", "cpu", *arguments, key=key)
        assert done.returncode == 0, done.stdout + done.stderr
        return Served(folder, done.stdout, key)

    yield start
    for folder in started:
        serve("stop", "--folder", str(folder))


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of models/tiny with its certificate, made by the pipeline; rounded, which takes less time."""
    folder = tmp_path_factory.mktemp("tiny")
    work, artifact = folder / "layers", folder / "artifact"
    run_module("calibrate", "--source", TINY, "--work", work, "--method", "rtn")
    run_module("postprocess", "--source", TINY, "--work", work, "--out", artifact)
    run_module("verify", "--artifact", artifact, "--source", TINY)
    return artifact


@pytest.fixture(scope="session")
def tiny(start: Callable[..., Served], tiny_artifact: Path) -> Served:
    """Two replicas of that artifact, with two drafts a step, and none while more than eight requests run; nothing of
    the guards and the probe is left out."""
    return start(tiny_artifact, "--drafts", "2", "--set", f"{SCHEDULE}=[[1,8,2],[9,256,0]]")


@pytest.fixture(scope="session")
def pair(start: Callable[..., Served], dense_model: Path) -> Served:
    """Two replicas of the dense model, with an API key."""
    return start(dense_model, "--drain", "120", *dense_settings(), key="sesame")


def wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.5)
