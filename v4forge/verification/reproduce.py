"""A run repeated from a manifest, and compared with it: each layer as soon as it is finished, then every file.

Equal bytes are promised on the same model of hardware, with the same versions and code. Elsewhere products round in
another order, codes near a tie fall the other way, and a layer is held to tolerances.REPLAY_LOSS_OFF and, where the
original layer lies beside the manifest, to tolerances.REPLAY_EQUAL_CODES.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from v4forge import digests
from v4forge.artifact_folder import FORMAT, MANIFEST, RUN
from v4forge.checkpoint.incoming import INDEX
from v4forge.errors import UserError
from v4forge.files import atomic_path, make_folder, read, read_json, understood
from v4forge.model import corpus, hub_rows
from v4forge.model.hub_rows import DataSet
from v4forge.quantization import layer_files
from v4forge.quantization.manifest import layer_entry
from v4forge.verification.tolerances import REPLAY_EQUAL_CODES, REPLAY_LOSS_OFF

if TYPE_CHECKING:
    import torch

Json = Mapping[str, Any]

KINDS = ("w1", "w2", "w3")
GPU = "NVIDIA"  # the hardware of a fingerprint begins so, unless it is a processor
SHOWN = 16  # hex digits of a digest
TOLD_OF_TEXT = ("documents", "bad_text")  # of a text's origin, what is not where it is from


@dataclass(frozen=True)
class Original:
    """A manifest that a run is compared with."""

    path: Path
    content: Json

    @property
    def settings(self) -> layer_files.Settings:
        """Raises UserError for settings that this version does not know."""
        stated = dict(self.content["calibration"]["settings"])
        known = {field.name for field in fields(layer_files.Settings)}
        if unknown := sorted(stated.keys() - known):
            raise UserError(f"{self.path} has the setting {unknown[0]}, which this version does not", "git log")
        return layer_files.Settings(**stated)

    @property
    def corpus(self) -> Json | None:
        """samples, seq_len, seed, origin; None of round-to-nearest."""
        found: Json | None = self.content["calibration"]["corpus"]
        return found

    @property
    def ranks(self) -> int | None:
        """How many processes the run had, as run.json beside the manifest tells; None where it does not."""
        counts = {layer.get("ranks") for layer in read_json(self.path.parent / RUN).get("layers", ())}
        return counts.pop() if len(counts) == 1 else None

    def entry(self, layer: int) -> Json:
        """What is said of a layer. Raises UserError when nothing is."""
        for each in self.content["layers"]:
            if each["layer"] == layer:
                return dict(each)
        raise UserError(f"{self.path} says nothing of layer {layer}", "pass the manifest of this model's artifact")

    def shard(self, layer: int) -> Path | None:
        """The original layer's file, where it lies beside the manifest as it was."""
        weight_map = read_json(self.path.parent / INDEX).get("weight_map") or {}
        name = weight_map.get(f"layers.{layer}.ffn.experts.0.w1.weight_packed")
        stated = self.content["files"].get(name)
        path = self.path.parent / str(name)
        there = bool(stated) and Path(str(name)).name == name and path.is_file()
        return path if there and path.stat().st_size == stated["bytes"] else None


def load(path: Path) -> Original:
    """Reads a manifest. Raises UserError for one that no run can be repeated from."""
    content = read(path, "make reproduce MANIFEST=<the manifest.json of an artifact>")
    if content.get("format") != FORMAT:
        fact = f"{path} has format {content.get('format')!r}, this version reads {FORMAT}"
        raise UserError(fact, "check out the version that wrote it: git log -- v4forge/quantization/manifest.py")
    made = content.get("calibration")
    if isinstance(made, dict) and "from" in made:
        raise UserError(f"{path}: {made['from']}; nobody here quantized them", "python -m scripts.postprocess --help")
    parts = (content.get("layers"), content.get("files"), content.get("source"), made)
    if not all(parts) or not {"settings", "corpus", "code", "versions", "hardware"} <= set(made or ()):
        raise UserError(f"{path} does not say what the artifact was made from", "take the manifest.json of an artifact")
    original = Original(path, content)
    understood(path, "take the manifest.json of an artifact", lambda: [_looked_at(each) for each in content["layers"]])
    return original


def _looked_at(entry: Json) -> tuple[int, ...]:
    """Looks at all that a comparison reads of a layer. Raises KeyError, TypeError or ValueError."""
    losses = [by["gptq"] for by in entry["error"].values()]
    kinds = [len(entry["codes"][which]) for which in KINDS]
    return int(entry["layer"]), len(entry["tokens"]), len(entry["blended"]), len(entry["fallback"]), len(losses), *kinds


def check_inputs(original: Original, mark: Json) -> None:
    """Raises UserError, naming the first difference, where the source, the corpus or a setting is another: then there
    is nothing to compare. `mark`: the fingerprint of the run that is to be compared."""
    stated = {name: entry["sha256"] for name, entry in original.content["source"]["files"].items()}
    for name in sorted(stated.keys() | mark["source"].keys()):
        there, here = stated.get(name), mark["source"].get(name)
        if there != here:
            fact = f"the source's {name}: sha256 {_short(there)} in {original.path}, {_short(here)} here"
            raise UserError(fact, "make reproduce … SOURCE=<the checkpoint that it was made from>")
    made = original.content["calibration"]
    stated_settings = asdict(original.settings)  # with what an earlier version did not know of
    if names := digests.changed(stated_settings, mark["settings"]):
        there, here = stated_settings.get(names[0]), mark["settings"].get(names[0])
        fact = f"{names[0]} is {there} in {original.path}, {here} here"
        raise UserError(fact, f"make reproduce MANIFEST={original.path}, which sets it")
    if names := digests.changed(made["corpus"], mark["corpus"]):
        fact = f"the calibration text is not that of {original.path}: {', '.join(names[:4])} differ"
        raise UserError(fact, "make reproduce … CORPUS=<the file that it was made with>")


def differences(original: Original, mark: Json, ranks: int) -> list[str]:
    """What lets bytes differ, a line each: hardware, versions, code, and on GPUs the number of processes."""
    made = original.content["calibration"]
    found = []
    if made["hardware"] != mark["hardware"]:
        found.append(f"hardware: {made['hardware']} there, {mark['hardware']} here")
    for name in digests.changed(made["versions"], mark["versions"]):
        found.append(f"{name} {made['versions'].get(name)} there, {mark['versions'].get(name)} here")
    if code := digests.changed(made["code"], mark["code"]):
        found.append(f"code: {', '.join(code)} changed")
    if str(mark["hardware"]).startswith(GPU) and original.ranks != ranks:
        found.append(f"GPUs: {original.ranks or 'an unknown number of'} there, {ranks} here")
    return found


@dataclass(frozen=True)
class Comparison:
    """Compares finished layers of `work` with a manifest. `exact`: they must be equal to the last bit."""

    original: Original
    work: Path
    exact: bool
    device: torch.device

    def layer(self, report: Json) -> str:
        """A line about a finished layer, from its report. Raises UserError for the first thing that is another."""
        number = report["layer"]
        theirs, ours = self.original.entry(number), layer_entry(report)
        said = self._equal(theirs, ours) if self.exact else self._near(number, theirs, ours)
        return f"layer {number} beside the manifest: {said}"

    def _fail(self, layer: int, what: str, there: object, here: object) -> UserError:
        fact = f"layer {layer}, {what}: {there} in the manifest, {here} here"
        return UserError(fact, f"rm -r {self.work}, then the same command: does it happen again?")

    def _equal(self, theirs: Json, ours: Json) -> str:
        layer = ours["layer"]
        for expert, (there, here) in enumerate(_pairs(theirs["tokens"], ours["tokens"])):
            if there != here:
                raise self._fail(layer, f"expert {expert}, tokens", there, here)
        for expert in range(len(ours["codes"]["w1"])):
            for which in KINDS:
                there, here = (_at(each["codes"].get(which, ()), expert) for each in (theirs, ours))
                if there != here:
                    raise self._fail(layer, f"expert {expert}, {which}, codes and scales", there, here)
        for name in digests.changed(theirs["error"], ours["error"]):
            which, _, method = name.partition(".")
            there, here = (each["error"].get(which, {}).get(method) for each in (theirs, ours))
            raise self._fail(layer, f"{which}, mean loss with {method}", there, here)
        for key in ("blended", "fallback"):
            if theirs[key] != ours[key]:
                raise self._fail(layer, key, theirs[key] or "none", ours[key] or "none")
        return f"identical, {sum(map(len, ours['codes'].values()))} matrices"

    def _near(self, layer: int, theirs: Json, ours: Json) -> str:
        said = []
        if ours["error"] and theirs["error"]:
            there, here = (statistics.fmean(by["gptq"] for by in each["error"].values()) for each in (theirs, ours))
            off = here / there - 1 if there else 0.0
            said.append(f"lost {there:.4%} there, {here:.4%} here ({off:+.3%})")
            if abs(off) > REPLAY_LOSS_OFF:
                what = f"mean loss, which may differ by {REPLAY_LOSS_OFF:.1%}"
                raise self._fail(layer, what, f"{there:.4%}", f"{here:.4%}")
        own, shard = layer_files.layer_file(self.work, layer), self.original.shard(layer)
        if shard is not None:
            equal = equal_codes(shard, own, self.device)
            said.append(f"{equal:.2%} of the codes equal")
            if equal < REPLAY_EQUAL_CODES:
                raise self._fail(layer, "codes that are equal", f"at least {REPLAY_EQUAL_CODES:.0%}", f"{equal:.2%}")
        pairs = [pair for which in KINDS for pair in _pairs(theirs["codes"].get(which, ()), ours["codes"][which])]
        said.append(f"{sum(a == b for a, b in pairs)} of {len(pairs)} matrices identical")
        return "; ".join(said)


def _pairs(one: Any, other: Any) -> Iterator[tuple[Any, Any]]:
    return ((_at(one, i), _at(other, i)) for i in range(max(len(one), len(other))))


def _at(values: Any, index: int) -> Any:
    return values[index] if index < len(values) else None


def _short(digest: str | None) -> str:
    return f"{digest[:SHOWN]}…" if digest else "not there"


def equal_codes(one: Path, other: Path, device: torch.device) -> float:
    """The share of two layer files' INT4 codes that are equal, over all experts."""
    import torch  # who has a device to compare on has it; a manifest can be read without

    equal = count = 0
    with safe_open(one, framework="pt") as a, safe_open(other, framework="pt") as b:
        for name in a.keys():  # noqa: SIM118, not a dict
            if name.endswith("weight_packed"):
                codes = [each.get_tensor(name).to(device).view(torch.uint8) for each in (a, b)]
                differing = codes[0] ^ codes[1]
                unequal = int((differing & 15).count_nonzero()) + int((differing >> 4).count_nonzero())
                count += 2 * differing.numel()
                equal += 2 * differing.numel() - unequal
    return equal / count


def data_set(original: Original) -> DataSet | None:
    """The data set that the manifest was calibrated on, None for a file and for nothing."""
    origin = (original.corpus or {}).get("origin", {})
    return DataSet(*(str(origin.get(each.name, "")) for each in fields(DataSet))) if "repo" in origin else None


def check_corpus(original: Original, file: Path | DataSet | None) -> None:
    """Raises UserError unless `file`, or for None the pinned data set, is what the manifest was calibrated on: said
    before anything is computed, and by content."""
    if original.corpus is None:
        return
    stated = {name: value for name, value in original.corpus["origin"].items() if name not in TOLD_OF_TEXT}
    if there := data_set(original):
        here = hub_rows.pinned() if file is None else file
        if there != here:
            fact = f"{original.path} is of {there}, this would be of {'a file' if isinstance(here, Path) else here}"
            raise UserError(fact, f"make reproduce … CORPUS={there.argument}")
        return
    fix = "make reproduce … CORPUS=<the file that it was made with>"
    wanted = f"the text of {original.path} has sha256 {_short(stated.get('file_sha256'))}"
    if not isinstance(file, Path) or not file.is_file():
        raise UserError(f"{wanted}, and {file or 'no file'} is given", fix)
    if (found := corpus.file_origin(file)) != stated:
        raise UserError(f"{wanted}, {file} has {_short(found['file_sha256'])}", fix)


def copied(original: Original, folder: Path) -> Path:
    """Puts the manifest, and what else of its artifact a comparison can use, into `folder`, where a container sees it
    -> the manifest there. Shards are linked: hard where the file system can, else by name."""
    make_folder(folder)
    for name in (MANIFEST, RUN, INDEX):
        source = original.path if name == MANIFEST else original.path.parent / name
        if source.is_file():
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(source, temporary)
        else:
            (folder / name).unlink(missing_ok=True)
    beside = {original.shard(each["layer"]) for each in original.content["layers"]}
    for shard in sorted(path for path in beside if path is not None):
        target = folder / shard.name
        target.unlink(missing_ok=True)
        try:
            os.link(shard.resolve(), target)  # the hub's cache holds links, which lead nowhere from elsewhere
        except OSError:
            target.symlink_to(shard.resolve())
    return folder / MANIFEST


def file_differences(original: Original, artifact: Path) -> dict[str, tuple[str, str]]:
    """name -> sha256 there and here, of the artifact's files that differ; "not there" where one side lacks it."""
    theirs, ours = original.content["files"], read_json(artifact / MANIFEST).get("files", {})
    both = {name: (theirs.get(name, {}).get("sha256"), ours.get(name, {}).get("sha256")) for name in {*theirs, *ours}}
    return {name: (_short(a), _short(b)) for name, (a, b) in sorted(both.items()) if a != b}


def layer_shards(artifact: Path) -> set[str]:
    """The shards that hold decoder layers: the only files in which a replay elsewhere may differ."""
    weight_map = read_json(artifact / INDEX).get("weight_map") or {}
    return {shard for name, shard in weight_map.items() if name.startswith("layers.")}
