"""What a run has written is hashed while it writes: postprocess reads no shard for its checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from programs import calibrate_arguments, run_here, write_corpus, write_source

from v4forge import digests
from v4forge.artifact_folder import SUMS
from v4forge.checkpoint.writer import write_shard


def test_postprocess_hashes_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source")
    arguments = calibrate_arguments(source, tmp_path / "layers", write_corpus(tmp_path / "corpus.txt"))
    assert run_here("calibrate", *arguments, "--method", "rtn") == 0
    read: list[str] = []
    plain = digests.file_sha256
    monkeypatch.setattr(digests, "file_sha256", lambda path, *rest: read.append(path.name) or plain(path, *rest))
    out = tmp_path / "artifact"
    assert run_here("postprocess", "--source", source, "--work", tmp_path / "layers", "--out", out) == 0
    assert "config.json" in read and not [name for name in read if name.endswith(".safetensors")]
    for line in (out / SUMS).read_text().splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest, name


def test_a_digest_gets_the_bytes_of_a_shard(tmp_path: Path) -> None:
    digest, tensors = hashlib.sha256(), {"b": torch.arange(5), "a": torch.ones(300, 7).bfloat16().T}
    write_shard(tmp_path / "x.safetensors", tensors, {"made": "here"}, digest)
    assert digest.hexdigest() == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
