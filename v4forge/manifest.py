"""Provenance that travels with the weights: manifest.json and SHA256SUMS. Only what determines bytes; no time, no host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from v4forge.files import write_json, write_text
from v4forge.stamps import Digests, read_json

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
UNSUMMED = (SUMS, "certificate.json", "README.md")  # written after the sums, or holding them


def _listed(paths: list[Path], digests: Digests) -> dict[str, dict[str, Any]]:
    sums = digests.of(paths)
    return {path.name: {"sha256": sums[path], "bytes": path.stat().st_size} for path in sorted(paths)}


def members(artifact: Path) -> list[Path]:
    """The files that SHA256SUMS covers, in name order."""
    return sorted(p for p in artifact.iterdir() if p.is_file() and p.name not in UNSUMMED and not p.name.startswith("."))


def mean_losses(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per matrix kind and method, the mean relative Hessian-weighted error over a layer's experts."""
    return {
        which: {method: sum(values) / len(values) for method, values in methods.items()}
        for which, methods in report["error"].items()
    }


def write(artifact: Path, work: Path, source: Path, mark: Mapping[str, Any], cache_file: Path) -> None:
    """Writes manifest.json, which lists every file but itself, and then SHA256SUMS, which covers it too.

    `mark` is the calibration's fingerprint; `work` holds its layer reports.
    """
    digests = Digests(cache_file)
    reports = [read_json(path) for path in sorted(work.glob("layer-*.json"))]
    content = {
        "format": 1,
        "recipe": "routed experts INT4 g128; attention FP8 128x128; MTP block BF16; F32 parameters F32",
        "source": {"files": _listed([source / name for name in mark["source"]], digests)},
        "calibration": {key: value for key, value in mark.items() if key != "source"},
        "layers": [
            {"layer": r["layer"], "error": mean_losses(r), "blended": r["blended"], "fallback": r["fallback"]}
            for r in reports
        ],
        "files": _listed([path for path in members(artifact) if path.name != MANIFEST], digests),
    }
    write_json(artifact / MANIFEST, content)
    sums = digests.of(members(artifact))
    write_text(artifact / SUMS, "".join(f"{sums[path]}  {path.name}\n" for path in members(artifact)))
    digests.save()
