"""Every stage killed with SIGKILL at one moment after another, then run to its end: the bytes of an undisturbed run.

Calibration also as two ranks, and from the hidden states that it has kept.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from programs import (
    Death,
    ForkServer,
    assert_shards_are_whole,
    calibrate_arguments,
    contents,
    run_here,
    temporaries,
    write_corpus,
    write_source,
)
from safetensors.torch import load_file

from v4forge.checkpoint.prefetch import Reader
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.writer import write_shard
from v4forge.quantization import calibrate as calibrate_stage
from v4forge.quantization import experts


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
def workshop(tmp_path_factory: pytest.TempPathFactory, fork_server: ForkServer) -> Workshop:
    base = tmp_path_factory.mktemp("kill")
    write_source(base / "source")
    write_corpus(base / "corpus.txt")
    made = Workshop(base, fork_server)
    for stage in ("calibrate", "postprocess", "verify", "dequant"):
        assert made.run(stage, made.calm) == 0
    return made


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
        Death("temporary", "calibration.html"),
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


# Of calibration: at random moments, below.
@pytest.mark.parametrize("stage", ["postprocess", "dequant"])
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
    for delay_s in (0.1, 0.05, 0.0):
        end = time.monotonic() + delay_s
        workshop.run("verify", tmp_path, until=lambda end=end: time.monotonic() > end)
        if not (artifact / "certificate.json").exists():
            break
        # The run had finished before the kill came, as on a busy machine: its certificate is whole.
        assert contents(artifact) == contents(calm)
        (artifact / "certificate.json").unlink()
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


# Calibration that keeps its hidden states before every layer.


def keeping(workshop: Workshop, folder: Path) -> list[str]:
    return [*workshop.arguments("calibrate", folder, folder), "--keep-every", "1"]


def assert_ended(workshop: Workshop, folder: Path) -> None:
    """All that a run keeps to itself is gone, and the rest has the undisturbed run's bytes."""
    assert contents(folder / "layers") == contents(workshop.calm / "layers")
    assert not (folder / "layers" / "streams").exists()
    assert not temporaries(folder / "layers")


def assert_layers_are_the_undisturbed_run_s(workshop: Workshop, work: Path) -> None:
    wanted = contents(workshop.calm / "layers")
    for path in work.glob("layer-*"):
        assert contents(work)[path.name] == wanted[path.name], path


def calibrate(workshop: Workshop, folder: Path, size: int = 0, delay_s: float | None = None) -> bool:
    """A run without torchrun's variables, or of `size` ranks; all are killed after `delay_s`. Whether it has ended."""
    log, arguments = workshop.base / "log.txt", keeping(workshop, folder)
    end = time.monotonic() + (delay_s or 0)
    until = None if delay_s is None else lambda: time.monotonic() > end
    if size:
        statuses = workshop.server.run_ranks(size, "calibrate", arguments, log, until=until)
    else:
        statuses = [workshop.server.run("calibrate", arguments, log, until=until)]
    killed = -signal.SIGKILL if until else 0
    assert set(statuses) <= {0, killed}, [path.read_text() for path in workshop.base.glob("log.txt*")]
    return set(statuses) == {0}


@pytest.mark.parametrize(
    ("size", "moments"),
    [
        pytest.param(0, 3, id="one process"),
        pytest.param(2, 2, id="two ranks"),
        pytest.param(0, 20, id="one process, soak", marks=pytest.mark.soak),
        pytest.param(2, 8, id="two ranks, soak", marks=pytest.mark.soak),
    ],
)
def test_calibration_killed_at_random_moments_ends_with_the_same_bytes(
    workshop: Workshop, tmp_path: Path, rng: random.Random, size: int, moments: int
) -> None:
    start = time.monotonic()
    assert calibrate(workshop, tmp_path / "whole", size)
    took_s = time.monotonic() - start
    assert_ended(workshop, tmp_path / "whole")
    for moment in range(moments):
        folder = tmp_path / str(moment)
        ended = calibrate(workshop, folder, size, delay_s=took_s * (moment + rng.random()) / moments)
        if not ended:
            assert_shards_are_whole(folder)
            assert_layers_are_the_undisturbed_run_s(workshop, folder / "layers")
        # a run of two ranks is continued by one and by two
        assert calibrate(workshop, folder, size * (moment % 2))
        assert_ended(workshop, folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "death",
    [
        Death("temporary", "00000.safetensors"),
        Death("renamed", "00000.safetensors"),
        Death("renamed", "00001.safetensors"),
        Death("renamed", "layer-000.safetensors"),
        Death("renamed", "layer-001.safetensors"),
        Death("temporary", "layer-002.safetensors"),
        Death("renamed", "layer-002.safetensors"),
        Death("temporary", "calibration.html"),
    ],
    ids=lambda death: f"{death.moment} {death.name}",
)
def test_what_a_killed_run_kept_to_itself_is_gone_at_the_end(workshop: Workshop, tmp_path: Path, death: Death) -> None:
    log = workshop.base / "log.txt"
    assert workshop.server.run("calibrate", keeping(workshop, tmp_path), log, death) == -signal.SIGKILL
    assert_layers_are_the_undisturbed_run_s(workshop, tmp_path / "layers")
    assert calibrate(workshop, tmp_path)
    assert_ended(workshop, tmp_path)


def test_a_reserved_layer_that_was_not_filled_is_not_taken_for_one(workshop: Workshop, tmp_path: Path) -> None:
    calm, work = workshop.calm / "layers", tmp_path / "layers"
    shutil.copytree(calm, work)
    for layer in (1, 2):  # its report is there, which is written first
        whole = work / f"layer-{layer:03}.safetensors"
        header = whole.read_bytes()[:5000]
        whole.rename(reserved := work / f".{whole.name}.shared.tmp")
        reserved.write_bytes(header + bytes(reserved.stat().st_size - len(header)))
    assert calibrate(workshop, tmp_path)
    assert_ended(workshop, tmp_path)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_layer_that_was_removed_is_made_again(workshop: Workshop, tmp_path: Path, layer: int) -> None:
    work = tmp_path / "layers"
    shutil.copytree(workshop.calm / "layers", work)
    (work / f"layer-{layer:03}.safetensors").unlink()
    kept = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert calibrate(workshop, tmp_path)
    assert_ended(workshop, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_lives(workshop: Workshop, tmp_path: Path) -> None:
    log, other = workshop.base / "log.txt", workshop.base / "other.txt"
    first = workshop.server.start("calibrate", keeping(workshop, tmp_path), log)
    while not (tmp_path / "layers" / "fingerprint.json").exists():
        time.sleep(0.001)
    os.kill(first, signal.SIGSTOP)
    assert workshop.server.run("calibrate", keeping(workshop, tmp_path), other) == 1
    os.kill(first, signal.SIGCONT)
    assert f"error: another run is writing to {tmp_path / 'layers'}\nhint: " in other.read_text()
    assert workshop.server.reap(first) == 0
    assert_ended(workshop, tmp_path)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_disk_that_fills_up_is_an_error_and_a_later_run_continues(
    workshop: Workshop, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    working, calls = getattr(os, call), {"posix_fallocate": 3, "pwrite": 150}  # in the second or third layer

    def full(*arguments: Any) -> Any:
        calls[call] -= 1
        if calls[call] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return working(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert run_here("calibrate", *keeping(workshop, tmp_path)) == 1
    error, hint = capsys.readouterr().err.splitlines()
    work = tmp_path / "layers"
    assert re.fullmatch(rf"error: cannot write {work}/layer-00[12].safetensors: No space left on device", error)
    assert hint.startswith("hint: free disk space")
    assert not temporaries(tmp_path)
    assert not (work / "layer-002.safetensors").exists()
    assert_layers_are_the_undisturbed_run_s(workshop, work)
    assert calibrate(workshop, tmp_path)
    assert_ended(workshop, tmp_path)


@pytest.fixture(scope="module")
def stopped(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed when all layers but the last were finished, with the hidden states before the last."""
    folder = tmp_path_factory.mktemp("stopped")
    death = Death("renamed", "layer-001.safetensors")
    arguments = keeping(workshop, folder)
    assert workshop.server.run("calibrate", arguments, workshop.base / "log.txt", death) == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "layers" / "streams" / "layer-002").iterdir()) == [
        "00000.safetensors",
        "00001.safetensors",
    ]
    return folder


def layers_read(
    workshop: Workshop, folder: Path, monkeypatch: pytest.MonkeyPatch, refuse_finished: bool = False
) -> list[int]:
    """Runs calibration here -> the layers of which it has read anything from the source."""
    read = []

    def noted(source: Checkpoint, groups: list[tuple[int, list[str]]], *rest: Any) -> Reader:
        read.extend(re.findall(r"^layers\.(\d+)\.", "\n".join(n for _, names in groups for n in names), re.MULTILINE))
        return Reader(source, groups, *rest)

    def refused(*_: Any) -> None:
        raise AssertionError("the experts of a finished layer are read")

    monkeypatch.setattr(calibrate_stage, "Reader", noted)
    if refuse_finished:
        monkeypatch.setattr(experts, "read_experts", refused)
    assert run_here("calibrate", *keeping(workshop, folder)) == 0
    return sorted(set(map(int, read)))


def test_a_run_continues_from_the_hidden_states_and_reads_no_finished_layer(
    workshop: Workshop, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert layers_read(workshop, tmp_path, monkeypatch, refuse_finished=True) == [2]
    assert_ended(workshop, tmp_path)


def truncate(streams: Path) -> None:
    path = streams / "layer-002" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def foreign(streams: Path) -> None:
    path = streams / "layer-002" / "00000.safetensors"
    write_shard(path, load_file(path), {"fingerprint": "another"})


def nonsense(streams: Path) -> None:
    (streams / "layer-002" / "00000.safetensors").write_text("nonsense")


def incomplete(streams: Path) -> None:
    (streams / "layer-002" / "00001.safetensors").unlink()


@pytest.mark.parametrize("damage", [truncate, foreign, nonsense, incomplete], ids=lambda damage: damage.__name__)
def test_hidden_states_that_are_damaged_or_another_run_s_are_not_used(
    workshop: Workshop, stopped: Path, tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "layers" / "streams")
    assert layers_read(workshop, tmp_path, monkeypatch)[0] < 2
    assert_ended(workshop, tmp_path)


def test_a_file_among_the_hidden_states_that_is_none_of_them_is_no_defect(
    workshop: Workshop, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (tmp_path / "layers" / "streams" / "notes.txt").write_text("mine")
    code = run_here("calibrate", *keeping(workshop, tmp_path))
    assert code == 0 or "hint: " in capsys.readouterr().err
    assert_layers_are_the_undisturbed_run_s(workshop, tmp_path / "layers")


def test_a_run_without_hidden_states_runs_its_finished_layers_again(
    workshop: Workshop, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "layers" / "streams")
    assert layers_read(workshop, tmp_path, monkeypatch) == [0, 1, 2]
    assert_ended(workshop, tmp_path)
