"""A file on its way: what came of it so far, kept under a name of its content, hashed while it comes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from v4forge.checkpoint import incoming
from v4forge.checkpoint.incoming import Expected
from v4forge.digests import CHUNK_BYTES
from v4forge.files import make_folder, sync, sync_folder, writing


def git_blob(size: int) -> hashlib._Hash:
    """git's sha1 of a file's content, before its first byte."""
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def path_of(folder: Path, file: Expected) -> Path:
    """Where what came of a file so far lies: another revision's is never gone on with."""
    mark = (file.sha256 or file.git_sha1 or "unknown")[:16]
    return incoming.incoming(folder) / f"{quote(file.name, safe='')}.{mark}.part"


class Partial:
    """An open partial file. `size` bytes of it are here, and hashed; opening it hashes those of an earlier run.

    One that is a link to a file of somebody's folder, left by a killed run, is not gone on with: it is not ours.
    """

    def __init__(self, path: Path, file: Expected) -> None:
        self.path, self.expected = path, file
        make_folder(path.parent)
        with writing(path):
            if path.exists() and path.stat().st_nlink > 1:
                path.unlink()
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._hash_anew()
        while part := os.read(self._descriptor, CHUNK_BYTES):
            self._hash(part)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.close(self._descriptor)

    def _hash_anew(self) -> None:
        self.size = 0
        self._sha256, self._git = hashlib.sha256(), git_blob(self.expected.bytes)

    def _hash(self, part: bytes) -> None:
        self._sha256.update(part)
        if self.expected.git_sha1:
            self._git.update(part)
        self.size += len(part)

    def write(self, part: bytes) -> None:
        """Adds what comes next. Raises UserError where the disk is full."""
        with writing(self.path):
            left = memoryview(part)
            while left:
                left = left[os.write(self._descriptor, left) :]
        self._hash(part)

    def clear(self) -> None:
        """Begins anew."""
        with writing(self.path):
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._hash_anew()

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def fault(self) -> str:
        """What is wrong with the whole; '' when it is what was expected."""
        if self.size != self.expected.bytes:
            return f"{self.size:,} bytes, not {self.expected.bytes:,}"
        if self.expected.sha256 and self.expected.sha256 != self.sha256:
            return f"sha256 {self.sha256}, not {self.expected.sha256}"
        if self.expected.git_sha1 and self.expected.git_sha1 != self._git.hexdigest():
            return f"git sha1 {self._git.hexdigest()}, not {self.expected.git_sha1}"
        return ""

    def publish(self, target: Path) -> None:
        """Gives the file its name, on the disk before that."""
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            sync(self._descriptor)
            os.replace(self.path, target)
            sync_folder(target.parent)
