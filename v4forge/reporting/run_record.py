"""What is known of the run that made an artifact and determined none of its bytes: machine, images, seconds, commands.

`run.json` beside manifest.json, of what the runner and the layers have noted in the work folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v4forge.artifact_folder import RUN
from v4forge.files import read_json, write_json
from v4forge.images import definitions
from v4forge.quantization.layer_reports import ASIDE

FORM = 1
STAGES = ("fetch", "calibrate", "postprocess", "verify", "verify-deep")  # that make an artifact, in their order
WORK = "$WORK"  # stands for the work folder in commands: where it lies is nobody's business
ELSEWHERE = re.compile(r"(?<![\w$.-])/(?:[^\s/'\"]+/)+")  # what leads to an absolute path's last part

Json = Mapping[str, Any]


def write(work: Path, artifact: Path) -> dict[str, Any]:
    """Writes run.json into the artifact and returns it; where the work folder knows nothing of the run, one that is
    there stays."""
    noted = read_json(work / "reports" / RUN)
    made = [name for name in STAGES if name in noted]
    if not made and (earlier := read_json(artifact / RUN)):
        return earlier
    reports = [read_json(path) for path in sorted((work / "layers").glob("layer-*.json"))]
    content = {
        "form": FORM,
        "stages": {name: _stage(noted[name], work) for name in made},
        "images": _images([noted[name] for name in made]),
        "layers": [_layer(report) for report in reports if report.get("run")],
    }
    write_json(artifact / RUN, content)
    return content


def _stage(entry: Json, work: Path) -> dict[str, Any]:
    """The runner's entry, with its image by ID."""
    command = str(entry.get("command", "")).replace(str(work.absolute()), WORK).replace(str(work), WORK)
    command = ELSEWHERE.sub("…/", command)
    known = {key: entry.get(key) for key in ("elapsed_s", "started", "machine", "revision")}
    return {**known, "command": command, "image": (entry.get("image") or {}).get("id")}


def _images(entries: Sequence[Json]) -> dict[str, Any]:
    """ID -> lane, and the digest by which images.lock has it, where it has."""
    locked = definitions.locked() if definitions.LOCK.is_file() else {}
    digests = {
        locked.get(f"{name.upper()}_IMAGE_ID"): locked.get(f"{name.upper()}_IMAGE") for name in definitions.IMAGES
    }
    found = {entry["image"]["id"]: entry["image"] for entry in entries if entry.get("image")}
    return {ID: {"lane": image.get("lane"), "reference": digests.get(ID) or None} for ID, image in found.items()}


def computing(seconds: Mapping[str, float]) -> float:
    """The seconds of a layer in which it computed: reading and writing go on beside that."""
    return sum(s for what, s in seconds.items() if what not in ASIDE)


def layers_s(run: Json) -> float:
    """What the layers of a run.json computed, all together and in whichever run each was made: what one run at
    least takes. 0 where they do not tell."""
    return sum(computing(layer["seconds"]) for layer in run.get("layers", ()))


def stages(run: Json) -> list[tuple[str, Json]]:
    """The stages of a run.json in the order in which they follow."""
    found = run.get("stages", {})
    return [(name, found[name]) for name in STAGES if name in found]


def _layer(report: Json) -> dict[str, Any]:
    """Seconds by stage of the rank that computed longest, and the most memory that one of them had."""
    ranks = report["run"]
    longest = max(ranks, key=lambda rank: computing(rank["seconds"]))
    return {
        "layer": report["layer"],
        "ranks": len(ranks),
        "seconds": longest["seconds"],
        "peak_gpu_bytes": max(rank["peak_gpu"] for rank in ranks),
        "peak_host_bytes": max(rank["peak_host"] for rank in ranks),
    }
