"""Taking the clock out of an image: nothing in its configuration or its layers is later than SOURCE_DATE_EPOCH.

Engines stamp a configuration with the time of the build and add fields of their own, and the folders that they mount
something into get the time of the mount. A sealed image has OCI's fields only, in canonical JSON, so that equal
contents have equal IDs on any engine.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tarfile
import tempfile
from contextlib import suppress
from typing import IO, Any

from docker import DockerClient
from docker.errors import APIError

from v4forge.images import definitions
from v4forge.images.archive import patient

# Of a configuration, what the OCI image specification defines.
CONFIG_FIELDS = ("architecture", "author", "config", "history", "os", "rootfs", "variant")
# Of a tar header (POSIX ustar), where the time of change and the checksum stand; both are octal text.
HEADER_BYTES = 512
MTIME = slice(136, 148)
CHECKSUM = slice(148, 156)


def seal(client: DockerClient, image: str, tag: str) -> str:
    """Gives the sealed form of `image` the name `tag` and removes what it was made from; the new ID."""
    patient(client)
    with tempfile.TemporaryFile() as saved, tempfile.TemporaryFile() as archive:
        for chunk in client.images.get(image).save():
            saved.write(chunk)
        write_sealed(saved, archive, tag)
        archive.seek(0)
        client.images.load(archive)
    made, unsealed = client.images.get(tag), client.images.get(image)
    if made.id != unsealed.id:
        with suppress(APIError):  # another image may be built on it
            client.images.remove(image, noprune=True)
    return str(made.id)


def write_sealed(saved: IO[bytes], archive: IO[bytes], tag: str) -> None:
    """Writes the sealed form of a `docker save` archive, which is changed in place, as one that `docker load` takes.

    The engine has the layers below the first one that changed: an archive without them says how they are put together.
    """
    saved.seek(0)
    with tarfile.open(fileobj=saved) as tar:
        manifest = json.load(_file(tar, "manifest.json"))[0]
        config = json.load(_file(tar, manifest["Config"]))
        layers = [_member(tar, name) for name in manifest["Layers"]]
    changed = [clamp(saved, layer) for layer in layers]
    diff_ids = config["rootfs"]["diff_ids"]
    for index, layer in enumerate(layers):
        if changed[index]:
            diff_ids[index] = f"sha256:{_sha256(saved, layer)}"
    names = [f"{index}/layer.tar" for index in range(len(layers))]
    described = [{"Config": "config.json", "RepoTags": [tag], "Layers": names}]
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in (("config.json", sealed(config)), ("manifest.json", json.dumps(described).encode())):
            _add(tar, name, len(content), io.BytesIO(content))
        for index in range(changed.index(True) if any(changed) else len(layers), len(layers)):
            saved.seek(layers[index].offset_data)
            _add(tar, names[index], layers[index].size, saved)


def sealed(config: dict[str, Any]) -> bytes:
    """A configuration with OCI's fields only, nothing in it created after SOURCE_DATE_EPOCH; canonical JSON."""
    latest = definitions.created()
    kept = {key: config[key] for key in CONFIG_FIELDS if config.get(key)}
    kept["created"] = latest
    kept["config"] = {key: value for key, value in config["config"].items() if value}
    kept["history"] = [
        {**entry, "created": min(entry.get("created", latest), latest)} for entry in config.get("history", [])
    ]
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def clamp(saved: IO[bytes], layer: tarfile.TarInfo) -> bool:
    """Sets the times of a layer's entries to SOURCE_DATE_EPOCH where they are later, in place; whether any was."""
    latest = definitions.epoch()
    saved.seek(layer.offset_data)
    with tarfile.open(fileobj=saved, mode="r:") as tar:
        later = [entry.offset_data - HEADER_BYTES for entry in tar if entry.mtime > latest]
    for offset in later:
        saved.seek(offset)
        header = bytearray(saved.read(HEADER_BYTES))
        header[MTIME] = b"%011o\0" % latest
        header[CHECKSUM] = b" " * 8  # counted as spaces
        header[CHECKSUM] = b"%06o\0 " % sum(header)
        saved.seek(offset)
        saved.write(header)
    return bool(later)


def _sha256(saved: IO[bytes], layer: tarfile.TarInfo) -> str:
    digest, left = hashlib.sha256(), layer.size
    saved.seek(layer.offset_data)
    while left:
        chunk = saved.read(min(left, 1 << 20))
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _member(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    """A member by name; docker saves a layer that it has saved already as a link."""
    member = tar.getmember(name)
    return (
        _member(tar, posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname)))
        if member.issym()
        else member
    )


def _file(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    file = tar.extractfile(name)
    assert file is not None, name
    return file


def _add(archive: tarfile.TarFile, name: str, size: int, content: IO[bytes]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size
    archive.addfile(entry, content)
