"""Every stage killed with SIGKILL at one moment after another, then run to its end: the bytes of an undisturbed run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import (
    Death,
    ForkServer,
    assert_shards_are_whole,
    calibrate_arguments,
    contents,
    fork_server,
    temporaries,
    write_corpus,
    write_source,
)


@dataclass
class Workshop:
    """A source, a corpus, and every stage's undisturbed output in `calm`."""

    base: Path
    server: ForkServer

    @property
    def calm(self) -> Path:
        return self.base / "calm"

    def arguments(self, stage: str, folder: Path, inputs: Path) -> list[str]:
        """The stage's arguments, with its output below `folder` and what earlier stages made below `inputs`."""
        source = self.base / "source"
        if stage == "calibrate":
            return calibrate_arguments(source, folder / "layers", self.base / "corpus.txt", samples=8)
        if stage == "postprocess":
            folders = {"source": source, "work": inputs / "layers", "out": folder / "artifact"}
        elif stage == "dequant":
            folders = {"source": source, "out": folder / "dequant"}
        else:
            folders = {"source": source, "artifact": folder / "artifact"}
        return [part for name, path in folders.items() for part in (f"--{name}", str(path))]

    def run(self, stage: str, folder: Path, death: Death | None = None, until: Callable[[], bool] | None = None) -> int:
        log = self.base / "log.txt"
        status = self.server.run(stage, self.arguments(stage, folder, self.calm), log, death, until)
        assert status in (0, -signal.SIGKILL), log.read_text()
        return status


OUTPUT = {"calibrate": "layers", "postprocess": "artifact", "verify": "artifact", "dequant": "dequant"}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    base = tmp_path_factory.mktemp("kill")
    write_source(base / "source")
    write_corpus(base / "corpus.txt")
    with fork_server() as server:
        made = Workshop(base, server)
        for stage in ("calibrate", "postprocess", "verify", "dequant"):
            assert made.run(stage, made.calm) == 0
        yield made


# The moments of death, in the order in which one run after the other meets them.
DEATHS: dict[str, list[Death]] = {
    "calibrate": [
        Death("temporary", "fingerprint.json"),
        Death("half", count=5),
        Death("temporary", "layer-000.safetensors"),
        Death("renamed", "layer-000.safetensors"),
        Death("temporary", "layer-001.json"),
        Death("half", count=30),
        Death("renamed", "layer-001.safetensors"),
        Death("renamed", "layer-002.json"),
    ],
    "postprocess": [
        Death("temporary", "model-00001-of-00005.safetensors"),
        Death("renamed", "model-00003-of-00005.safetensors"),
        Death("half", count=3),
        Death("temporary", "model-00005-of-00005.safetensors"),
        Death("renamed", "model.safetensors.index.json"),
        Death("temporary", "config.json"),
        Death("temporary", "tokenizer.json"),
        Death("renamed", "manifest.json"),
        Death("temporary", "SHA256SUMS"),
    ],
    "dequant": [
        Death("half", count=5),
        Death("temporary", "model-00002-of-00005.safetensors"),
        Death("renamed", "model-00004-of-00005.safetensors"),
        Death("temporary", "model.safetensors.index.json"),
        Death("renamed", "config.json"),
    ],
}


def assert_nothing_is_half_done(found: Path, calm: Path) -> None:
    """Each file under a final name is one of the undisturbed run's, byte for byte."""
    assert_shards_are_whole(found)
    wanted = contents(calm)
    for name, content in contents(found).items():
        if not name.startswith("."):
            assert content == wanted[name], name


def without_certificate(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != "certificate.json"}


@pytest.mark.parametrize("stage", DEATHS)
def test_a_stage_killed_again_and_again_gives_the_same_bytes(workshop: Workshop, tmp_path: Path, stage: str) -> None:
    found, calm = tmp_path / OUTPUT[stage], workshop.calm / OUTPUT[stage]
    left = 0
    for death in DEATHS[stage]:
        assert workshop.run(stage, tmp_path, death) == -signal.SIGKILL, death
        left += len(temporaries(found))
        assert_nothing_is_half_done(found, calm)
    assert left >= len(DEATHS[stage]) // 2  # most deaths did hit a file that was being written
    assert workshop.run(stage, tmp_path) == 0
    assert without_certificate(contents(found)) == without_certificate(contents(calm))


@pytest.mark.parametrize(("stage", "file"), [("calibrate", "layer-001.safetensors"), ("dequant", "config.json")])
def test_a_stage_killed_from_outside_when_a_file_appears_gives_the_same_bytes(
    workshop: Workshop, tmp_path: Path, stage: str, file: str
) -> None:
    found, calm = tmp_path / OUTPUT[stage], workshop.calm / OUTPUT[stage]
    workshop.run(stage, tmp_path, until=(found / file).exists)
    assert_nothing_is_half_done(found, calm)
    assert workshop.run(stage, tmp_path) == 0
    assert without_certificate(contents(found)) == without_certificate(contents(calm))


@pytest.mark.parametrize("stage", DEATHS)
def test_a_stage_killed_at_growing_delays_gives_the_same_bytes(workshop: Workshop, tmp_path: Path, stage: str) -> None:
    found, calm = tmp_path / OUTPUT[stage], workshop.calm / OUTPUT[stage]
    for delay_s in (0.02, 0.06, 0.15, 0.4):
        end = time.monotonic() + delay_s
        if workshop.run(stage, tmp_path, until=lambda end=end: time.monotonic() > end) == 0:
            break
        if found.exists():
            assert_nothing_is_half_done(found, calm)
    assert workshop.run(stage, tmp_path) == 0
    assert without_certificate(contents(found)) == without_certificate(contents(calm))


def test_verify_killed_gives_no_certificate_and_then_the_same(workshop: Workshop, tmp_path: Path) -> None:
    artifact, calm = tmp_path / "artifact", workshop.calm / "artifact"
    assert workshop.run("postprocess", tmp_path) == 0
    assert workshop.run("verify", tmp_path, Death("temporary", "certificate.json")) == -signal.SIGKILL
    assert not (artifact / "certificate.json").exists()
    end = time.monotonic() + 0.1
    assert workshop.run("verify", tmp_path, until=lambda: time.monotonic() > end) == -signal.SIGKILL
    assert not (artifact / "certificate.json").exists()
    assert workshop.run("verify", tmp_path) == 0
    assert contents(artifact) == contents(calm)
    # a certificate that is there when verify starts does not outlive a run that does not finish
    assert workshop.run("verify", tmp_path, Death("temporary", "certificate.json")) == -signal.SIGKILL
    assert not (artifact / "certificate.json").exists()


def test_a_killed_postprocess_leaves_no_sums_that_would_pass(workshop: Workshop, tmp_path: Path) -> None:
    assert workshop.run("postprocess", tmp_path) == 0
    assert workshop.run("postprocess", tmp_path, Death("half", count=3)) == -signal.SIGKILL
    assert not (tmp_path / "artifact" / "SHA256SUMS").exists()
    assert workshop.run("postprocess", tmp_path) == 0
    artifact = contents(workshop.calm / "artifact")
    assert contents(tmp_path / "artifact") == without_certificate(artifact)
