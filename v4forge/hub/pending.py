"""What is to be fetched: what of a source belongs to a checkpoint, what of it is here, in which order shards come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from v4forge.checkpoint.incoming import INDEX, Expected, Listing
from v4forge.digests import Digests
from v4forge.errors import UserError
from v4forge.hub.folder_source import FolderSource
from v4forge.hub.hub_source import Hub

SHARD_SUFFIX = ".safetensors"
# What a repository may hold and nobody here reads: weights in other forms, and what is for people's eyes.
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".tar", ".gz", ".zip")
FOR_EYES = (".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4")


@dataclass
class Pending:
    """What is to be done. here: files that are there and right; wrong: that are there, but are others."""

    listing: Listing
    skipped: list[str]
    here: list[Expected] = field(default_factory=list)
    wrong: list[Expected] = field(default_factory=list)
    unsure: list[Expected] = field(default_factory=list)  # right by size, not read yet

    @property
    def missing(self) -> list[Expected]:
        there = {each.name for each in (*self.here, *self.unsure)}
        return [each for name, each in self.listing.files.items() if name not in there]

    @property
    def total_bytes(self) -> int:
        return sum(each.bytes for each in self.listing.files.values())


def looked_over(source: Hub | FolderSource, out: Path, digests: Digests) -> Pending:
    """What `source` has that belongs to a checkpoint, and what of it is in `out`; reads none of the files there."""
    files: dict[str, Expected] = {}
    skipped = []
    for each in sorted(source.listing(), key=lambda each: each.name):
        if is_wanted(each.name):
            files[each.name] = each
        else:
            skipped.append(each.name)
    if INDEX not in files:
        where = source.folder if isinstance(source, FolderSource) else source.repo
        raise UserError(f"{where} has no {INDEX}: it is no checkpoint of this kind", "correct FROM=, or FLASH_REPO")
    pending = Pending(Listing(source.repo, source.revision, files), skipped)
    for each in files.values():
        path = out / each.name
        if not path.is_file():
            continue
        if path.stat().st_size != each.bytes:
            pending.wrong.append(each)
        elif each.sha256 is None and each.git_sha1 is None:
            (pending.here if _is_copy(source, path, each.name) else pending.wrong).append(each)
        elif each.sha256 is not None and (known := digests.known(path)) is not None:
            (pending.here if known == each.sha256 else pending.wrong).append(each)
        else:
            pending.unsure.append(each)
    return pending


def is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or any(part.startswith(".") for part in path.parts):
        return False
    return not name.lower().endswith((*OTHER_WEIGHTS, *FOR_EYES))


def _is_copy(source: Hub | FolderSource, path: Path, name: str) -> bool:
    """Whether a file is that of the source's folder: where no hash is known, by inode or by time."""
    assert isinstance(source, FolderSource)
    origin = source.paths[name]
    return path.samefile(origin) or path.stat().st_mtime_ns == origin.stat().st_mtime_ns


def in_order(weight_map: Mapping[str, str]) -> list[str]:
    """The shards in the order in which calibration needs them: root and MTP, then by the lowest layer."""

    def needed(name: str) -> int:
        parts = name.split(".", 2)
        return int(parts[1]) if parts[0] == "layers" and len(parts) > 1 and parts[1].isdigit() else -1

    first: dict[str, int] = {}
    for name, shard in weight_map.items():
        first[shard] = min(needed(name), first.get(shard, 1 << 30))
    return sorted(first, key=lambda shard: (first[shard], shard))
