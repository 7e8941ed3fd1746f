"""Provenance that travels with the weights: manifest.json and SHA256SUMS. What determines bytes; no time, no host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from v4forge.files import read_json, write_json, write_text
from v4forge.recipe import RULES
from v4forge.stamps import Digests

MANIFEST, SUMS, CARD = "manifest.json", "SHA256SUMS", "README.md"
UNSUMMED = (SUMS, "certificate.json", CARD)  # written after the sums, or holding them


def _listed(paths: list[Path], digests: Digests) -> dict[str, dict[str, Any]]:
    sums = digests.of(paths)
    return {path.name: {"sha256": sums[path], "bytes": path.stat().st_size} for path in sorted(paths)}


def members(artifact: Path) -> list[Path]:
    """The files that SHA256SUMS covers, in name order."""
    files = [path for path in artifact.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in files if path.name not in UNSUMMED)


def mean_losses(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per matrix kind and method, the mean relative Hessian-weighted error over a layer's experts."""
    return {
        which: {method: sum(values) / len(values) for method, values in methods.items()}
        for which, methods in report["error"].items()
    }


def write(
    artifact: Path, reports: Sequence[Mapping[str, Any]], source: Path, mark: Mapping[str, Any], cache_file: Path
) -> None:
    """Writes manifest.json, which lists every file but itself, and then SHA256SUMS, which covers it too.

    `mark` is the fingerprint of what made the layers; `reports` has what layers.report returns, or as much as is known.
    """
    digests = Digests(cache_file)
    content = {
        "format": 1,
        "recipe": "routed experts INT4 g128; attention FP8 128x128; MTP block BF16; F32 parameters F32",
        "source": {"files": _listed([source / name for name in mark["source"]], digests)},
        "calibration": {key: value for key, value in mark.items() if key != "source"},
        "layers": [
            {"layer": r["layer"], "error": mean_losses(r)} | {key: r[key] for key in ("blended", "fallback", "codes")}
            for r in reports
        ],
        "files": _listed([path for path in members(artifact) if path.name != MANIFEST], digests),
    }
    write_json(artifact / MANIFEST, content)
    sums = digests.of(members(artifact))
    write_text(artifact / SUMS, "".join(f"{sums[path]}  {path.name}\n" for path in members(artifact)))
    digests.save()


def _calibrated(mark: Mapping[str, Any]) -> str:
    """What the experts' codes come from, in a sentence."""
    if "from" in mark:
        return f"Not known here: {mark['from']}; `manifest.json` lists the files."
    return mark["corpus"]["description"] if mark.get("corpus") else "None: round-to-nearest."


def write_card(artifact: Path, tensors: int) -> None:
    """Writes README.md, the model card, from manifest.json and the recipe."""
    content = read_json(artifact / MANIFEST)
    shards = [entry["bytes"] for name, entry in content["files"].items() if name.endswith(".safetensors")]
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False)
    card = environment.get_template("model_card.md.j2").render(
        title="DeepSeek-V4 W4A16 + FP8 with a BF16 MTP block",
        tensors=f"{tensors:,}",
        bytes=sum(shards),
        shards=len(shards),
        rules=RULES,
        calibration=_calibrated(content["calibration"]),
        losses=[layer for layer in content["layers"] if layer["error"]],
    )
    write_text(artifact / CARD, card)
