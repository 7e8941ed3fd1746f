"""The artifact folder: layer files and pass-through shards under one index, with config, manifest and checksums."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from v4forge import artifact_folder, digests
from v4forge.checkpoint import layout, recipe
from v4forge.checkpoint.conversion import converted
from v4forge.checkpoint.layout import Config
from v4forge.checkpoint.prefetch import one_thread_each
from v4forge.checkpoint.reader import INDEX, Checkpoint
from v4forge.checkpoint.writer import write_index, write_shard
from v4forge.errors import UserError
from v4forge.files import (
    atomic_path,
    can_link,
    check_no_pointer,
    link_or_copy,
    make_folder,
    read_json,
    remove_leftovers,
    write_json,
)
from v4forge.quantization import layer_files, manifest
from v4forge.units import GB

REQUIRED_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_FILES = (
    *REQUIRED_FILES,
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "LICENSE",
)
THREADS = min(16, len(os.sched_getaffinity(0)))  # that decode tensors, of the MTP block above all
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def tokenizer_files(source: Path) -> list[Path]:
    """The files beside the weights that a server needs. Raises UserError when the tokenizer is missing, or git-LFS left
    a pointer in a file's place."""
    for name in REQUIRED_FILES:
        if not (source / name).is_file():
            raise UserError(f"{source / name} is missing", f"put the checkpoint's {name} there")
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for path in found:
        check_no_pointer(path)
    return found


def finished_layers(source: Checkpoint, work: Path) -> list[Path]:
    """The layer files of `work`, all whole and of the one fingerprint that claimed it; UserError otherwise."""
    mark = read_json(work / layer_files.FINGERPRINT)
    again = f"python -m scripts.calibrate --source {source.directory} --work {work} …"
    if not mark:
        raise UserError(f"{work} holds no calibration", again)
    digest = digests.digest_of(mark)
    for layer in source.config.layers:
        if not layer_files.finished(work, layer, digest):
            raise UserError(f"{layer_files.layer_file(work, layer)} is missing or of another run", again)
    return [layer_files.layer_file(work, layer) for layer in source.config.layers]


def config_json(config: Config) -> dict[str, Any]:
    """The artifact's config.json: upstream's, with the quantization_config that vLLM resolves."""
    return config.raw | {"quantization_config": recipe.quantization_config(config.num_hidden_layers, config.fp4_layers)}


def copy(source: Path, target: Path) -> None:
    """Copies a small file, whole or not at all."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def claim_output(out: Path, inputs: Sequence[Path], own: Set[str]) -> None:
    """Makes `out` ready to be written: without shards of another number and leftovers of a killed run.

    Raises UserError, before anything is removed, when `out` is an input or holds a file that is not one of `own`.
    """
    for folder in inputs:
        if out.resolve() == folder.resolve():
            raise UserError(f"{out} is an input, its files would be overwritten", "choose another --out")
    make_folder(out)
    remove_leftovers(out)
    files = sorted(path for path in out.iterdir() if path.name not in own and not path.name.startswith("."))
    for path in files:
        if not path.is_file() or not SHARD.fullmatch(path.name):
            fact = f"{out} holds {path.name}, which no earlier run wrote"
            raise UserError(fact, "choose an empty --out, or move the file away")
    for path in files:
        path.unlink()


def check_room_for_layers(finished: Sequence[Path], out: Path) -> None:
    """Raises UserError where layer files cannot be linked into `out` and their copies do not fit there."""
    if can_link(finished[0], out):
        return
    here = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    needed = sum(path.stat().st_size for path in finished) - here
    free = shutil.disk_usage(out).free
    if needed > free:
        fact = (
            f"{out} takes no links to files of {finished[0].parent}, and copies take {needed / GB:,.1f} GB:"
            f" {(needed - free) / GB:,.1f} GB are missing"
        )
        raise UserError(
            fact, "free that much there, or choose a local disk, which makes links: make … SCRATCH=<folder>"
        )


@dataclass(frozen=True)
class Origin:
    """Where an artifact's decoder layers come from."""

    folder: Path  # an input: nothing is written there
    mark: Mapping[str, Any]  # all that determined their bytes; each layer's shard carries its digest
    place: Callable[[int, Path], Mapping[str, Any]]  # puts a layer's shard at a path -> the layer's report


def assemble(
    source: Checkpoint, work: Path, out: Path, progress: Callable[[int, str], None] = lambda _done, _what: None
) -> None:
    """Writes the artifact of a finished calibration into `out`: layer files linked, the rest by `build`.

    Raises UserError before anything is written when the source or a layer file is not what it must be.
    """
    source.validate(layout.upstream(source.config))
    finished = finished_layers(source, work)
    tokenizer_files(source.directory)  # before every byte is read for the digests
    mark = read_json(work / layer_files.FINGERPRINT)
    source = source.made_by(mark["settings"]["recipe"])
    cache = digests.cache_of(work.parent)
    if layer_files.source_digests(source.directory, source.shard_names, cache) != mark["source"]:
        raise UserError(
            f"{source.directory} is not the source that {work} was calibrated on",
            "pass that --source, or calibrate again",
        )

    check_room_for_layers(finished, out)

    def place(layer: int, path: Path) -> Mapping[str, Any]:
        link_or_copy(finished[layer], path)
        return read_json(layer_files.layer_report(work, layer))

    build(source, Origin(work, mark, place), out, cache, progress)


def build(source: Checkpoint, origin: Origin, out: Path, cache: Path, progress: Callable[[int, str], None]) -> None:
    """Writes the artifact into `out`: layers from their origin, the rest converted from the source, then index,
    configs, tokenizer, manifest and SHA256SUMS. Killed anywhere and run again it gives the same bytes. `cache` keeps
    the digests of files. The source is one that `validate` accepts.
    """
    config = source.config
    side_files = tokenizer_files(source.directory)
    groups = {"root": list(layout.root_parameters(config)), "mtp": list(layout.mtp_parameters(config))}
    total = len(config.layers) + len(groups)
    names = [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    written = {*names, *(path.name for path in side_files), INDEX, "config.json", artifact_folder.MANIFEST}
    claim_output(out, (source.directory, origin.folder), {*written, *TOKENIZER_FILES, *artifact_folder.UNSUMMED})
    for stale in sorted({*TOKENIZER_FILES, *artifact_folder.UNSUMMED} - written):
        (out / stale).unlink(missing_ok=True)
    reports = []
    known = digests.Digests(cache)  # the layers' files were hashed as they were made
    for layer, name in zip(config.layers, names, strict=False):
        progress(layer, "layers")
        reports.append(origin.place(layer, out / name))
    for done, (name, what) in enumerate(zip(names[len(reports) :], groups, strict=True), len(reports)):
        progress(done, what)
        sha256 = hashlib.sha256()
        with one_thread_each(), ThreadPoolExecutor(THREADS, "convert") as pool:
            parts = pool.map(lambda each: converted(source, *each), groups[what])
            tensors = {stored: tensor for part in parts for stored, tensor in part.items()}
        write_shard(out / name, tensors, digest=sha256)
        known.learn(out / name, sha256.hexdigest())
        del tensors
    known.save()
    expected = layout.artifact(config)
    shards = {name: safe_open(out / name, framework="pt") for name in names}
    weight_map = {tensor: name for name, file in shards.items() for tensor in file.keys()}  # noqa: SIM118, not a dict
    if set(weight_map) != set(expected):
        odd = sorted(set(weight_map) ^ set(expected))[0]
        fact = f"{odd} is in the layer files or in the layout, but not in both"
        raise UserError(fact, f"remove {origin.folder} and calibrate again")
    write_index(out, weight_map, sum(spec.bytes for spec in expected.values()))
    write_json(out / "config.json", config_json(config))
    for path in side_files:
        copy(path, out / path.name)
    progress(total, "SHA256SUMS")
    manifest.write(out, reports, source.directory, config, origin.mark, cache)
