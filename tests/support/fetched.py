"""Fetch as tests run it, from a server in the place of the hub's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hub_stand_in import CHUNK_BYTES, MAIN, Hub, Repo, serving
from huggingface_hub import constants
from programs import ROOT, run_here
from safetensors.torch import load_file
from synthetic import write_checkpoint

from v4forge.checkpoint import incoming
from v4forge.checkpoint.writer import write_index, write_shard
from v4forge.hub import fetch, hub_source

REPO = "some/model"
LARGE = dict(shards=3, vocab_size=2048, hidden_size=256)  # shards larger than what is asked for as a header
TOKEN = "hf_" + "secret" * 5


def write_upstream(directory: Path) -> Path:
    """A checkpoint with what else a repository has."""
    write_checkpoint(directory, **LARGE)
    (directory / "encoding").mkdir()
    (directory / "encoding" / "chat.py").write_text("# how a chat is written\n")
    (directory / "LICENSE").write_text("free\n")
    return directory


def shard_of_layer(layer: int) -> str:
    return f"model-layer-{layer}.safetensors"


ROOT_SHARD = "model-root.safetensors"


def write_by_layer(source: Path, directory: Path) -> Path:
    """The same checkpoint with one shard a layer, and one for root and MTP."""
    directory.mkdir(exist_ok=True)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, directory / path.name)
            continue
        for name, tensor in load_file(path).items():
            parts = name.split(".")
            shard = shard_of_layer(int(parts[1])) if parts[0] == "layers" else ROOT_SHARD
            shards.setdefault(shard, {})[name] = tensor
    for shard, tensors in shards.items():
        write_shard(directory / shard, tensors)
    write_index(directory, {name: shard for shard, tensors in shards.items() for name in tensors}, 0)
    return directory


@contextmanager
def serving_upstream(upstream: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub with it, for programs of this process: impatient ones, that ask for little of a header."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(hub_source, "BACKOFF_S", 0.01)
    monkeypatch.setattr(fetch, "HEADER_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr(incoming, "POLL_S", 0.01)
    with serving(Hub({REPO: Repo.of(upstream, xet=True)})) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def arguments(out: Path, *more: object) -> list[str]:
    return [str(word) for word in ("--out", out, "--repo", REPO, "--revision", MAIN, *more)]


def fetched(out: Path, *more: object) -> int:
    return run_here("fetch", *arguments(out, *more))


def in_process(out: Path, *more: object) -> subprocess.Popen[str]:
    """The program as one that can be killed."""
    command = [sys.executable, "-m", "scripts.fetch", *arguments(out, *more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_same(out: Path, upstream: Path) -> None:
    names = {path.relative_to(upstream).as_posix() for path in upstream.rglob("*") if path.is_file()}
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(".")} == names
    for name in names:
        assert (out / name).read_bytes() == (upstream / name).read_bytes(), name
    assert not incoming.incoming(out).exists()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The fact of the one error that a program has said."""
    lines = capsys.readouterr().err.splitlines()
    facts = [line for line in lines if line.startswith("error: ")]
    assert len(facts) == 1 and lines[lines.index(facts[0]) + 1].startswith("hint: "), lines
    return facts[0].removeprefix("error: ")


def shards(upstream: Path) -> list[str]:
    return sorted(path.name for path in upstream.glob("*.safetensors"))


def asked_bytes(served: Hub, name: str) -> int:
    return sum(request.sent for request in served.asked_for(REPO, name))
