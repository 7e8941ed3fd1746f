"""Deployments that the tests start with `make serve BACKEND=cpu`, as its program, on the loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import dense
from dense import TINY
from programs import run_module

from benchmarks.clients import Outcome, ask_all
from v4forge.serving import client
from v4forge.serving.deployment import Deployment
from v4forge.serving.settings import serving

ROOT = Path(__file__).resolve().parents[2]
SERVE_ENVIRONMENT = ROOT / ".venv-serve-cpu"
SERVE_LOCK = ROOT / "docker/requirements-serve-cpu.txt"
LOOK = Path(__file__).with_name("model_infos.py")
PLUGINS = (ROOT / "patches/vllm/plugin", ROOT / "patches/vllm-cpu/plugin")
SCHEDULE = "speculative-config.num_speculative_tokens_per_batch_size"
# For the bench of tools: its twelve are 2,600 tokens of models/tiny's tokenizer.
ROOM = "max-model-len=8192"
# The seed of a request that ends what computes it.
POISON = 666_013
# Tokens of a step: longer prompts are read in pieces.
CHUNK = 512


@dataclass(frozen=True)
class Served:
    """A deployment that runs. `said` is what the start printed, `arguments` are its options."""

    folder: Path
    said: str
    key: str = ""
    arguments: Sequence[str] = ()

    @property
    def deployment(self) -> Deployment:
        deployment = Deployment.load(self.folder)
        assert deployment is not None
        return deployment

    @property
    def key_words(self) -> list[str]:
        """The option that gives a bench the key of a deployment that it is told the address of."""
        return ["--api-key-file", str(self.folder / "keys/api_key")] if self.key else []

    @property
    def computing(self) -> float:
        """Requests that the replicas run, or that wait there."""
        readings = [client.metrics(endpoint) for endpoint in self.deployment.endpoints]
        return sum((reading.running or 0) + (reading.waiting or 0) for reading in readings)

    def program(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return serve(command, "--folder", str(self.folder), *arguments)

    def up(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Makes of it what these options and those of the start describe."""
        return serve("up", *self.arguments, *arguments, key=self.key)

    def ask_all(self, requests: list[dict[str, object]], meanwhile: Callable[[], None] | None = None) -> list[Outcome]:
        return ask_all(self.deployment.url, requests, self.key, meanwhile)

    def ask(self, request: dict[str, object]) -> Outcome:
        (outcome,) = self.ask_all([request])
        return outcome


def serve(command: str, *arguments: str, key: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m scripts.serve`, with an API key in its environment."""
    words = [sys.executable, "-m", "scripts.serve", command, *arguments]
    environment = os.environ | {"V4FORGE_CPU_POISON": str(POISON)} | ({"API_KEY": key} if key else {})
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)


def calibrated(folder: Path, *options: str) -> Path:
    """An artifact of models/tiny by GPTQ, half of whose scales are negative; of another recipe with `options`."""
    work, artifact = folder / "layers", folder / "artifact"
    text = ("--corpus", TINY / "calibration.jsonl", "--samples", "8", "--seq-len", "256")
    run_module("calibrate", "--source", TINY, "--work", work, *text, *options)
    run_module("postprocess", "--source", TINY, "--work", work, "--out", artifact)
    return artifact


def look_at_models(caches: Path) -> None:
    """Leaves there what vLLM finds of its model classes, which in a start takes two processes more a replica."""
    variables = os.environ | serving("published", "cpu", {}).variables(str(caches))
    command = [SERVE_ENVIRONMENT / "bin/python", LOOK]
    subprocess.run(command, env=variables, check=True, capture_output=True)


def share_caches(folder: Path, caches: Path, replicas: int = 2) -> Path:
    """Lets the replicas of a deployment to be keep their caches in `caches`, where the first leaves what takes half of
    a start: vLLM's look at its model classes, in a process each, and inductor's C++. Both write there as they do below
    ~/.cache, which many processes share. Returns the deployment's folder."""
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    for number in range(replicas):
        if not (own := folder / "cache" / str(number)).is_symlink():
            own.symlink_to(caches)
    return folder


def dense_settings() -> list[str]:
    """The options that serve the dense model, and let the probe find what it cannot do."""
    settings = [f"{name}={value}" for name, value in dense.SETTINGS.items()]
    return ["--drafts", "0", "--allow", "certificate", *dense.CANNOT, "--set", *settings]


def wait_until(condition: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.5)
