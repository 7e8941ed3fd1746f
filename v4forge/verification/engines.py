"""Two implementations of GPTQ on one source, beside each other: how many codes are equal, what each loses, by layer.

Each is an artifact, or the folder of a calibration's layer files; its manifest, or its fingerprint, says whose GPTQ it
is (`calibrate --engine`). What was found is kept in reports/engines.json, by the fingerprints of both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4forge import digests
from v4forge.artifact_folder import FORMAT, MANIFEST
from v4forge.errors import UserError
from v4forge.files import read, read_json, write_json
from v4forge.quantization import layer_files
from v4forge.quantization.layer_files import ENGINES, FINGERPRINT
from v4forge.quantization.manifest import layer_entry, method_of
from v4forge.verification import reproduce

if TYPE_CHECKING:
    import torch

Json = Mapping[str, Any]

FOUND = "reports/engines.json"
AGAIN = "make peer report"  # the other implementation's calibration, and a report with both


@dataclass(frozen=True)
class Side:
    """One calibration. `mark`: its fingerprint; `layers`: layer -> what the manifest says of it, or would."""

    folder: Path
    mark: Json
    layers: Mapping[int, Json]
    files: Mapping[int, Path]  # layer -> the file with its codes

    @property
    def engine(self) -> str:
        """One of ENGINES; "" where no GPTQ made the codes."""
        settings = self.mark["settings"]
        return settings.get("engine", ENGINES[0]) if settings["method"] == "gptq" else ""

    @property
    def told(self) -> dict[str, Any]:
        """What a report says of it."""
        version = self.mark["versions"].get(self.engine)
        return {"made": method_of(self.mark), "engine": self.engine, "version": version}


def opened(folder: Path) -> Side:
    """An artifact, the layers of a calibration, or a work folder that has one of them. Raises UserError for another."""
    for place in (folder, folder / "layers", folder / "artifact"):
        if (place / FINGERPRINT).is_file():
            return _of_layers(place)
        if (place / MANIFEST).is_file():
            return _of_artifact(place)
    fact = f"{folder} is neither an artifact nor the layers of a calibration"
    raise UserError(fact, "pass a folder with manifest.json or fingerprint.json: --peer DIR")


def _of_layers(folder: Path) -> Side:
    mark = read(folder / FINGERPRINT, "python -m scripts.calibrate --help")
    layers, files = {}, {}
    for path in sorted(folder.glob("layer-*.json")):
        entry = layer_entry(read(path, "python -m scripts.calibrate --help"))
        number = entry["layer"]
        if layer_files.finished(folder, number, digests.digest_of(mark)):
            layers[number], files[number] = entry, layer_files.layer_file(folder, number)
    return Side(folder, mark, layers, files)


def _of_artifact(folder: Path) -> Side:
    original = reproduce.load(folder / MANIFEST)
    stated = {name: entry["sha256"] for name, entry in original.content["source"]["files"].items()}
    entries = {entry["layer"]: entry for entry in original.content["layers"]}
    shards = {layer: original.shard(layer) for layer in entries}
    files = {layer: path for layer, path in shards.items() if path is not None}
    return Side(folder, {**original.content["calibration"], "source": stated}, entries, files)


def beside(work: Path, ours: Side) -> Side | None:
    """Another engine's calibration of the same source in the work folder, the one with most layers; None where there
    is none."""
    engines = {place: _engine(place) for place in sorted(work.iterdir()) if place.is_dir()}
    found = [opened(place) for place, engine in engines.items() if engine not in ("", ours.engine)]
    of_this = [side for side in found if side.mark["source"] == ours.mark["source"]]
    return max(of_this, key=lambda side: len(side.files), default=None)


def own(work: Path) -> Side | None:
    """GPTQ's calibration in a work folder: its layers, or its artifact where those are gone. None where it has none."""
    there = [place for place in (work / "layers", work / "artifact") if _engine(place)]
    return opened(there[0]) if there else None


def _engine(place: Path) -> str:
    """Whose GPTQ a folder is of; "" where it is of none, or its manifest is of another version."""
    mark, manifest = read_json(place / FINGERPRINT), read_json(place / MANIFEST)
    if not mark and manifest.get("format") == FORMAT:
        mark = manifest.get("calibration") or {}
    settings = mark.get("settings") or {}
    return str(settings.get("engine", ENGINES[0])) if settings.get("method") == "gptq" else ""


def check(ours: Side, theirs: Side) -> None:
    """Raises UserError unless both are of one source, by GPTQ, and of two engines."""
    for side in (ours, theirs):
        if not side.engine:
            raise UserError(f"{side.folder} is {method_of(side.mark)}, which no engine made", AGAIN)
    if ours.mark["source"] != theirs.mark["source"]:
        fact = f"{theirs.folder} was made from another source than {ours.folder}"
        raise UserError(fact, "pass a calibration of the same source: --peer DIR")
    if ours.engine == theirs.engine:
        fact = f"{ours.folder} and {theirs.folder} are both by the engine {ours.engine}"
        other = next(engine for engine in ENGINES if engine != ours.engine)
        raise UserError(fact, f"python -m scripts.calibrate --engine {other} …, and pass its folder: --peer DIR")
    if not ours.files.keys() & theirs.files.keys():
        raise UserError(f"{theirs.folder} has no layer that {ours.folder} has too", AGAIN)


def compared(
    ours: Side, theirs: Side, device: torch.device, progress: Callable[[int, str], None] = lambda _done, _what: None
) -> dict[str, Any]:
    """What reports/engines.json holds: both, what differs besides the engine, and by layer the share of equal codes,
    how many matrices are identical with their scales, and the mean loss of each; of the layers that both quantized.
    progress: layers done, what next."""
    both = ours.files.keys() & theirs.files.keys()
    common = sorted(layer for layer in both if ours.layers[layer]["error"] and theirs.layers[layer]["error"])
    rows = []
    for done, layer in enumerate(common):
        progress(done, f"layer {layer}")
        there, here = theirs.layers[layer]["codes"], ours.layers[layer]["codes"]
        same = [a == b for which in here for a, b in zip(here[which], there[which], strict=True)]
        rows.append(
            {
                "layer": layer,
                "equal_codes": reproduce.equal_codes(ours.files[layer], theirs.files[layer], device),
                "identical": sum(same),
                "matrices": len(same),
                "loss": [_loss(side.layers[layer]) for side in (ours, theirs)],
            }
        )
    settings = digests.changed(dict(ours.mark["settings"]), dict(theirs.mark["settings"]))
    text = digests.changed(ours.mark["corpus"], theirs.mark["corpus"])
    return {
        "fingerprints": [_fingerprint(side) for side in (ours, theirs)],
        "engines": [ours.told, theirs.told],
        "differing": [name for name in settings if name != "engine"] + (["calibration text"] if text else []),
        "hardware": [side.mark["hardware"] for side in (ours, theirs)],
        "layers": rows,
    }


def _fingerprint(side: Side) -> str:
    return digests.digest_of({**side.mark, "layers": sorted(side.files)})


def _loss(entry: Json) -> float:
    """The mean over a layer's matrices."""
    return statistics.fmean(by["gptq"] for by in entry["error"].values())


def kept(work: Path) -> dict[str, Any] | None:
    """What was found of the calibration that the work folder has now; None where nothing was."""
    if not (work / FOUND).is_file():
        return None
    found, ours = read(work / FOUND, AGAIN), own(work)
    return found if ours and found.get("fingerprints", [""])[0] == _fingerprint(ours) else None


def is_kept(work: Path, ours: Side, theirs: Side) -> bool:
    """Whether reports/engines.json is of these two. Raises UserError for two that no comparison is of."""
    check(ours, theirs)
    return read_json(work / FOUND).get("fingerprints") == [_fingerprint(side) for side in (ours, theirs)]


def update(work: Path, ours: Side, theirs: Side, device: torch.device, progress: Callable[[int, str], None]) -> None:
    """Writes reports/engines.json."""
    write_json(work / FOUND, compared(ours, theirs, device, progress))
