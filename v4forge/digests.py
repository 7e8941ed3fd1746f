"""Digests: sha256 of files, remembered by (size, mtime_ns, inode); of JSON values, and where two of them differ."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from v4forge.files import changed_json, read_json

CHUNK_BYTES = 8 << 20
READ_BYTES = 1 << 20  # at a time, by each of the threads
HASH_THREADS = len(os.sched_getaffinity(0))


def cache_of(folder: Path) -> Path:
    """Where the digests of what a run reads and makes in `folder` are kept."""
    return folder / ".stamps" / "digests.json"


class Digests:
    """sha256 of files, remembered in a JSON file. Hard links share an entry: the inode is what was read.

    Several processes may use one file at a time: each adds what it has learnt. Several threads may use one object.
    """

    def __init__(self, cache_file: Path) -> None:
        self.cache_file = cache_file
        self._by_path: dict[str, list[Any]] = {}
        self._by_inode: dict[tuple[int, int, int], str] = {}
        self._own: dict[str, list[Any]] = {}  # what the file does not have yet
        self._changing = threading.RLock()  # held for a moment, never while a file is hashed
        self.reload()

    def reload(self) -> None:
        """Takes in what other processes have learnt."""
        found = read_json(self.cache_file)
        with self._changing:
            self._by_path = {path: entry for path, entry in {**found, **self._own}.items() if _is_entry(entry)}
            self._by_inode |= {tuple(entry[:3]): entry[3] for entry in self._by_path.values()}

    def of(self, paths: Sequence[Path]) -> dict[Path, str]:
        """path -> sha256 in hex. Raises OSError for a path that cannot be read."""
        keys = {path: _identity(path) for path in paths}
        if any(key not in self._by_inode for key in keys.values()):
            self.reload()  # another process may know them
        unknown = {key: path for path, key in keys.items() if key not in self._by_inode}
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            hashed = dict(zip(unknown, pool.map(file_sha256, unknown.values()), strict=True))
        with self._changing:
            self._by_inode |= hashed
            for path, key in keys.items():
                self._remember(path, key, self._by_inode[key])
        return {path: self._by_inode[key] for path, key in keys.items()}

    def known(self, path: Path) -> str | None:
        """The sha256 of a file as it is now, if it needs no reading; None also when there is no such file."""
        try:
            return self._by_inode.get(_identity(path))
        except OSError:
            return None

    def learn(self, path: Path, sha256: str) -> None:
        """Takes the digest of a file from who has just read it all, or written it."""
        key = _identity(path)
        with self._changing:
            self._by_inode[key] = sha256
            self._remember(path, key, sha256)

    def _remember(self, path: Path, key: tuple[int, int, int], sha256: str) -> None:
        entry = [*key, sha256]
        if self._by_path.get(str(path)) != entry:
            self._by_path[str(path)] = self._own[str(path)] = entry

    def save(self) -> None:
        """Writes what is new into the cache, which loses the files that are gone. UserError where it cannot."""
        with self._changing:
            if not self._own:
                return
            own, self._own = self._own, {}
        with changed_json(self.cache_file) as found:
            found |= own
            for path in [path for path in found if not os.path.exists(path)]:
                del found[path]


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(each) for each in entry] == [int, int, int, str]


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def file_sha256(path: Path, progress: Callable[[int], None] = lambda _bytes: None) -> str:
    """The sha256 of a file in hex; progress gets the bytes of each part. Raises OSError where it cannot be read."""
    digest, part = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(part):
            digest.update(part[:count])
            progress(count)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """sha256 of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def changed(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted names at which two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [p for k in keys for p in changed(before.get(k), after.get(k), f"{path}.{k}" if path else k)]
    return [] if before == after else [path]
