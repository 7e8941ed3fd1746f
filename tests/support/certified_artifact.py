"""A folder in the form of a finished artifact, with made-up bytes: certificate, sums and manifest agree with them."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

CHECKS = [{"name": name, "ok": True, "detail": "fine"} for name in ("tensors", "checksums")]
SHARDS = 5
SHARD_BYTES = 40_000


def write(work: Path) -> Path:
    """`work`/artifact, whose shards are hard links to `work`/layers, as after `make artifact`."""
    artifact, layers = work / "artifact", work / "layers"
    layers.mkdir(parents=True)
    artifact.mkdir()
    noise = random.Random(0)
    for number in range(1, SHARDS + 1):
        shard = layers / f"layer-{number}.safetensors"
        shard.write_bytes(noise.randbytes(SHARD_BYTES + number))
        os.link(shard, artifact / f"model-{number:05}-of-{SHARDS:05}.safetensors")
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json", "tokenizer.json"):
        (artifact / name).write_text(json.dumps({"name": name}))
    (artifact / "LICENSE").write_text("MIT\n")
    listed = {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in artifact.iterdir()}
    (artifact / "manifest.json").write_text(json.dumps({"format": 2, "files": listed}))
    seal(artifact)
    (artifact / "README.md").write_text("---\nlicense: mit\n---\n# The card\n")
    (artifact / "run.json").write_text("{}")
    return artifact


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def seal(artifact: Path, **changes: Any) -> None:
    """Writes SHA256SUMS over what is there, and a certificate of it that passes, but for `changes`."""
    last = ("SHA256SUMS", "certificate.json", "certificate.sig.json", "README.md", "run.json")
    paths = sorted(path for path in artifact.iterdir() if path.name not in last)
    (artifact / "SHA256SUMS").write_text("".join(f"{sha256_of(path)}  {path.name}\n" for path in paths))
    certificate = {"ok": True, "sums_sha256": sha256_of(artifact / "SHA256SUMS"), "checks": CHECKS, "not_run": {}}
    (artifact / "certificate.json").write_text(json.dumps(certificate | changes))
