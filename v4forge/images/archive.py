"""A container image as `docker save` writes it: its config and the files of its layers.

The stream is read once, member by member; no layer is held in memory or written to disk. Both forms are understood:
docker's own (`<id>/layer.tar`) and the OCI layout (`blobs/sha256/<digest>`), which share their manifest.json.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, BinaryIO

from docker import DockerClient
from docker.errors import ImageNotFound

from v4forge.errors import UserError
from v4forge.images import refusals
from v4forge.units import GIB, MIB

BLOCK = 1 << 20
SILENCE_S = 3600
DOCUMENT_BYTES = 4 << 20  # a config or manifest is smaller
TYPES = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.GNUTYPE_SPARSE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symlink",
    tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "fifo",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A path of a layer. `content` is a file's sha256, a link's target or a device's number."""

    type: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: float
    content: str
    extra: str = ""  # owner names and extended attributes


@dataclass(frozen=True)
class Layer:
    """`bytes` is the sum of its files' sizes; `files` keep the order of the archive."""

    diff_id: str
    bytes: int
    files: dict[str, Entry]
    created_by: str = ""
    member: str = ""  # its name in the archive


@dataclass(frozen=True)
class Saved:
    """An image: `id` is the digest of its config. `open` starts the stream that it was read from again."""

    id: str
    config: dict[str, Any]
    layers: list[Layer]
    open: Callable[[], Iterable[bytes]] = field(compare=False, repr=False)


class Chunks(io.RawIOBase):
    """A file object over chunks of bytes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = iter(chunks)
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = memoryview(chunk)
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count


class Hashing(io.RawIOBase):
    """A file object that hashes what is read through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.file.read(len(buffer))
        self.digest.update(block)
        buffer[: len(block)] = block
        return len(block)


def of_daemon(client: DockerClient, image: str) -> Saved:
    """The image of this name or ID that the daemon has."""
    try:
        client.images.get(image)
    except ImageNotFound:
        raise refusals.no_built_image(image) from None
    patient(client)
    return read(lambda: client.api.get_image(image, chunk_size=BLOCK))


def patient(client: DockerClient) -> None:
    """Lets the daemon be silent for as long as it takes to pack or unpack a large layer."""
    client.api.timeout = SILENCE_S


def read(source: Callable[[], Iterable[bytes]]) -> Saved:
    """The only image of a `docker save` archive. Raises UserError for anything else."""
    documents: dict[str, bytes] = {}
    layers: dict[str, Layer] = {}
    links: dict[str, str] = {}
    try:
        for name, target, stream in members(source()):
            if stream is None:
                links[name] = target
                continue
            head = stream.peek(512)[:512]
            if is_layer(name, head):
                layers[name] = read_layer(name, unpacked(name, head, stream))
            elif name.endswith(".json") or head[:1] == b"{":
                documents[name] = stream.read(DOCUMENT_BYTES)
        (entry,) = json.loads(documents["manifest.json"])
        config_bytes = documents[entry["Config"]]
        config = json.loads(config_bytes)
        found = [layers[links.get(name, name)] for name in entry["Layers"]]
        diff_ids = config["rootfs"]["diff_ids"] or []
    except (KeyError, TypeError, ValueError, EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"this is not a whole archive of one image: {error!r}", "docker save IMAGE > FILE") from None
    if diff_ids != [layer.diff_id for layer in found]:
        raise UserError("the layers of this archive are not those that its config names", "docker save it again")
    steps = [step.get("created_by", "") for step in config.get("history") or [] if not step.get("empty_layer")]
    named = [
        Layer(layer.diff_id, layer.bytes, layer.files, step or "", layer.member)
        for layer, step in zip_longest(found, steps[: len(found)])
    ]
    return Saved("sha256:" + hashlib.sha256(config_bytes).hexdigest(), config, named, source)


def members(chunks: Iterable[bytes]) -> Iterator[tuple[str, str, io.BufferedReader | None]]:
    """(name, "", its content) of the archive's files, (name, target, None) of its links."""
    with tarfile.open(fileobj=io.BufferedReader(Chunks(chunks), BLOCK), mode="r|") as archive:
        for member in archive:
            if member.issym():
                yield member.name, posixpath.normpath(posixpath.dirname(member.name) + "/" + member.linkname), None
            elif member.islnk():
                yield member.name, member.linkname, None
            elif member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, "", io.BufferedReader(content, BLOCK)  # type: ignore[arg-type]


def is_layer(name: str, head: bytes) -> bool:
    """Whether a member of the archive is a tar file, packed or not; an empty one is zeros."""
    packed = head[:2] == b"\x1f\x8b" or head[:4] == b"\x28\xb5\x2f\xfd"
    return packed or name.endswith("/layer.tar") or head[257:262] == b"ustar" or not any(head)


def unpacked(name: str, head: bytes, stream: io.BufferedReader) -> BinaryIO:
    if head[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    if head[:4] == b"\x28\xb5\x2f\xfd":
        raise UserError(f"{name} is packed with zstd", "skopeo copy --dest-compress-format gzip … docker-archive:FILE")
    return stream


def entries(stream: BinaryIO) -> Iterator[tuple[str, tarfile.TarInfo, BinaryIO | None]]:
    """(path, header, content of a file) of a layer, up to its last byte."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            yield "/" + member.name.removeprefix("./").strip("/"), member, content  # type: ignore[misc]
    while stream.read(BLOCK):
        pass


def read_layer(name: str, stream: BinaryIO) -> Layer:
    hashing = Hashing(stream)
    files: dict[str, Entry] = {}
    for path, member, content in entries(hashing):  # type: ignore[arg-type]
        files[path] = entry(member, content)
    size = sum(file.size for file in files.values())
    return Layer("sha256:" + hashing.digest.hexdigest(), size, files, member=name)


def entry(member: tarfile.TarInfo, content: BinaryIO | None) -> Entry:
    kind = TYPES.get(member.type, f"type {member.type!r}")
    if kind == "file" and content is not None:
        what = hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
    elif "device" in kind:
        what = f"{member.devmajor}:{member.devminor}"
    else:
        what = member.linkname
    known = ("path", "linkpath", "size", "mtime", "uid", "gid", "uname", "gname")
    more = [f"{key}={value}" for key, value in sorted(member.pax_headers.items()) if key not in known]
    names = [f"owner={member.uname}:{member.gname}"] if member.uname or member.gname else []
    size = member.size if kind == "file" else 0
    return Entry(kind, member.mode, member.uid, member.gid, size, member.mtime, what, " ".join(names + more))


def step_of(created_by: str, length: int = 100) -> str:
    """A step of a build without the shell and the build arguments that stand before its command."""
    command = re.sub(r"^(RUN )?(\|\d+ .*? )?/bin/sh -\w+ (#\(nop\) +)?", r"\1", created_by)
    return shortened(command or "imported", length)


def shortened(text: str, length: int = 100) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


# --- sizes


def layer_sizes(client: DockerClient, image: str) -> list[tuple[int, str]]:
    """(bytes, the step that made it) of every layer that holds something, first to last, without reading the image."""
    steps = reversed(client.api.history(image))
    return [(step["Size"], step["CreatedBy"]) for step in steps if step["Size"]]


def size_report(layers: Sequence[tuple[int, str]], budget_gib: float) -> list[str]:
    """A table of layer sizes, its sum and the budget. Raises UserError, with the largest layer, beyond the budget."""
    total = sum(size for size, _ in layers)
    if total > budget_gib * GIB:
        size, step = max(layers)
        raise UserError(
            f"the image has {total / GIB:.2f} GiB, its budget is {budget_gib:g} GiB; the largest layer has"
            f" {size / GIB:.2f} GiB: {step_of(step, 80)}",
            "make that layer smaller, or raise its budget in v4forge/images/definitions.py",
        )
    rows = [f"{size / MIB:>10,.1f}   {step_of(step, 80)}" for size, step in layers]
    last = f"{total / MIB:>10,.1f}   together, {total / GIB / budget_gib:.0%} of {budget_gib:g} GiB"
    return [f"{'size, MiB':>10}   layer", *rows, last]
