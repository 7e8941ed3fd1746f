"""Provenance that travels with the weights: manifest.json and SHA256SUMS. What determines bytes; no time, no host.

`make reproduce MANIFEST=<file>` repeats a run from it. What does not determine bytes is in run.json beside it
(v4forge/reporting/run_record.py), which the checksums leave out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v4forge.artifact_folder import FORMAT, MANIFEST, RUN, SUMS, members
from v4forge.checkpoint import incoming, recipe
from v4forge.checkpoint.layout import Config
from v4forge.digests import Digests
from v4forge.files import write_json, write_text
from v4forge.quantization.layer_files import METHODS

BY_ENGINE = {"llmcompressor": " by llm-compressor"}  # of layer_files.ENGINES, whose GPTQ is not our own


def _listed(paths: list[Path], digests: Digests) -> dict[str, dict[str, Any]]:
    sums = digests.of(paths)
    return {path.name: {"sha256": sums[path], "bytes": path.stat().st_size} for path in sorted(paths)}


def mean_losses(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Per matrix kind and method, the mean relative Hessian-weighted error over a layer's experts."""
    return {
        which: {method: sum(values) / len(values) for method, values in methods.items()}
        for which, methods in report["error"].items()
    }


def layer_entry(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of a layer, from what layers.report returns, or from as much of it as is known.

    `tokens`: by expert, how many went through it, [] where none did; `codes`: by matrix kind, a digest an expert.
    """
    known = {key: report[key] for key in ("layer", "blended", "fallback", "codes")}
    known["stored"] = report.get("stored", "int4")  # the format of its experts, of formats.PARTS
    return {**known, "error": mean_losses(report), "tokens": list(report.get("tokens", ()))}


def method_of(calibration: Mapping[str, Any]) -> str:
    """How the experts were quantized, in words, from what the manifest says of the calibration; and by which recipe,
    where it is not the usual one."""
    if "from" in calibration:
        return "another tool"
    settings = calibration["settings"]
    engine = BY_ENGINE.get(settings.get("engine", ""), "") * (settings["method"] == "gptq")
    made_by = settings.get("recipe", recipe.INT4)
    return METHODS[settings["method"]] + engine + f" (recipe {made_by})" * (made_by != recipe.INT4)


def _source(folder: Path, names: Sequence[str], digests: Digests) -> dict[str, Any]:
    """The source's files; and the repository and revision that `fetch` took them from, None where it did not."""
    listing = incoming.listing(folder)
    return {
        "repo": listing.repo if listing else None,
        "revision": listing.revision if listing else None,
        "files": _listed([folder / name for name in names], digests),
    }


def write(
    artifact: Path,
    reports: Sequence[Mapping[str, Any]],
    source: Path,
    config: Config,
    mark: Mapping[str, Any],
    cache_file: Path,
) -> None:
    """Writes manifest.json, which lists every file but itself, and then SHA256SUMS, which covers it too.

    `mark` is the fingerprint of what made the layers; `reports` has what layers.report returns, or as much as is known;
    `config` knows the recipe.
    """
    digests = Digests(cache_file)
    rules = [asdict(rule) for rule in recipe.rules(config.fp4_layers)]
    content = {
        "format": FORMAT,
        "run": RUN,
        "recipe": {"name": config.recipe, "rules": rules, "aliases": recipe.ALIASES},
        "source": _source(source, mark["source"], digests),
        "calibration": {key: value for key, value in mark.items() if key != "source"},
        "layers": [layer_entry(report) for report in reports],
        "files": _listed([path for path in members(artifact) if path.name != MANIFEST], digests),
    }
    write_json(artifact / MANIFEST, content)
    sums = digests.of(members(artifact))
    write_text(artifact / SUMS, "".join(f"{sums[path]}  {path.name}\n" for path in members(artifact)))
    digests.save()
