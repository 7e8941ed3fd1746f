"""Folders that a model card is written from, without a tensor in them: Flash's dimensions, made-up figures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_results

from v4forge.checkout import ROOT
from v4forge.checkpoint import layout, recipe

REPO, REVISION = "deepseek-ai/DeepSeek-V4-Flash", "c" * 40
FLASH_CONFIG = ROOT / "v4forge/pipeline/flash_config.json"
TINY_CONFIG = ROOT / "models/tiny/config.json"
MACHINE = {
    "cpu": "A CPU",
    "cores": 192,
    "memory_bytes": 2 << 40,
    "kernel": "6",
    "gpus": ["NVIDIA H200"] * 8,
    "driver": "580",
}
IMAGE = {"id": "sha256:" + "7" * 64, "lane": "cuda", "layers": []}


def estimate(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def _drafts(worse: float) -> list[dict[str, Any]]:
    rates = [0.86, 0.78, 0.71]
    return [{"acceptance_after_accepted": estimate(rate - worse, 0.01)} for rate in rates]


DEEP = {
    "tokens": 8176,
    "sequences": 16,
    "text": {"file": "heldout.txt", "sha256": "8" * 64},
    "unigram_perplexity": 900.0,
    "models": {
        "source": {"perplexity": estimate(5.1, 0.3), "drafts": _drafts(0)},
        "artifact": {
            "perplexity": estimate(5.15, 0.3),
            "perplexity_change_percent": estimate(0.9, 0.4),
            "top1_agreement": estimate(0.955, 0.01),
            "kl_nats": {"mean": estimate(0.012, 0.001), "p99": 0.2},
            "drafts": _drafts(0.01),
        },
    },
}
SECONDS = {"fetch": 1800.0, "calibrate": 700.5, "postprocess": 180.0, "verify": 200.0}  # of the stages that ran
CHECKS = [{"name": name, "ok": True, "detail": f"{name} is as it must be."} for name in ("tensors", "checksums")]


def manifest(config: Path, repo: str | None = REPO) -> dict[str, Any]:
    """A manifest of the model of a config.json, 85 GB in two shards."""
    shape = layout.parse_config(json.loads(config.read_text()), str(config))
    loss = {which: {"gptq": 0.0012, "rtn": 0.0051, "rtn_same_scales": 0.0014} for which in ("w1", "w2", "w3")}
    experts = shape.n_routed_experts
    return {
        "format": 2,
        "run": "run.json",
        "recipe": {"rules": [asdict(rule) for rule in recipe.RULES], "aliases": recipe.ALIASES},
        "source": {
            "repo": repo,
            "revision": REVISION if repo else None,
            "files": {"config.json": {"sha256": "1" * 64, "bytes": 10}},
        },
        "calibration": {
            "corpus": {
                "sha256": "2" * 64,
                "origin": {"repo": "org/chats", "revision": "d" * 40, "split": "train", "documents": 200_000},
                "documents": list(range(500)),
                "samples": 768,
                "seq_len": 512,
                "seed": 42,
            },
            "settings": {"method": "gptq", "scales": "searched", "dampening": 0.01, "experts": "routed"},
            "code": {"gptq": "3" * 64},
            "versions": {"torch": "2.x"},
            "hardware": "NVIDIA H200",
        },
        "layers": [
            {
                "layer": layer,
                "tokens": [100 + 37 * layer] + [9000 + 100 * layer] * (experts - 1),
                "error": {w: {m: v * (1 + layer / 50) for m, v in by.items()} for w, by in loss.items()},
                "blended": [{"expert": 0, "tokens": 100 + 37 * layer, "inputs": "w1, w3"}],
                "fallback": [],
                "codes": {which: ["4" * 16] * experts for which in loss},
            }
            for layer in shape.layers
        ],
        "files": {
            f"model-{i:05}-of-00002.safetensors": {"sha256": f"{i}" * 64, "bytes": 85_200_000_000} for i in (1, 2)
        },
    }


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(
    work: Path, config: Path = FLASH_CONFIG, repo: str | None = REPO, results: Iterable[dict[str, Any]] = ()
) -> Path:
    """Writes `work` with artifact/ and reports/, certificate ok, and results that say that they are of this artifact
    -> the artifact's folder."""
    artifact, reports = work / "artifact", work / "reports"
    artifact.mkdir(parents=True)
    reports.mkdir()
    (artifact / "config.json").write_bytes(config.read_bytes())
    (artifact / "LICENSE").write_text("MIT License\n\nCopyright (c) somebody\n")
    small = {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in artifact.iterdir()}
    content = manifest(config, repo)
    for name, shard in content["files"].items():  # of that size, and of no bytes
        with open(artifact / name, "wb") as file:
            file.truncate(shard["bytes"])
    content["files"] |= small
    (artifact / "manifest.json").write_text(json.dumps(content))
    digests = {name: entry["sha256"] for name, entry in content["files"].items()}
    digests["manifest.json"] = sha256_of(artifact / "manifest.json")
    (artifact / "SHA256SUMS").write_text("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))
    sums = sha256_of(artifact / "SHA256SUMS")
    certificate = {"ok": True, "sums_sha256": sums, "checks": CHECKS, "not_run": {}, "deep": DEEP}
    (artifact / "certificate.json").write_text(json.dumps(certificate))
    noted = {
        name: {
            "elapsed_s": s,
            "started": f"2026-11-26T0{i}:00:00+00:00",
            "command": f"python -m scripts.{name} --work {work}/layers",
            "machine": MACHINE,
            "image": IMAGE,
        }
        for i, (name, s) in enumerate(SECONDS.items())
    }
    (reports / "run.json").write_text(json.dumps(noted))
    own = list(results)
    for result in own:
        result["target"]["artifact"]["sums_sha256"] = sums
    bench_results.write(reports, *own)
    return artifact
