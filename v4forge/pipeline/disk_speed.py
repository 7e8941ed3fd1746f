"""How fast the disk below a folder is: measured once with a file of its own, and kept for whoever estimates with it."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from v4forge.files import make_folder, read_json, write_json, writing

CHUNK_BYTES = 16 << 20
FILE = "disk.json"  # in the work folder's .stamps


@dataclass(frozen=True)
class Speed:
    """Sequential, in bytes a second: written and flushed to the disk; read with nothing of it in the page cache."""

    write_bytes_s: float
    read_bytes_s: float


def measure(folder: Path, size_bytes: int = 1 << 30) -> Speed:
    """The speed of one file of that size in `folder`, which has no name there: it is gone whatever ends the process.

    A file system in memory has no cache to forget, and its speed is the memory's. Raises UserError where the file
    cannot be written.
    """
    chunk = os.urandom(min(CHUNK_BYTES, size_bytes))
    with writing(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(size_bytes // len(chunk)):
            left = memoryview(chunk)
            while left:
                left = left[os.write(file.fileno(), left) :]
        os.fsync(file.fileno())
        written_s = time.perf_counter() - started
        _forget(file.fileno())
        file.seek(0)
        buffer = bytearray(len(chunk))
        started, read = time.perf_counter(), 0
        while count := file.readinto(buffer):
            read += count
        read_s = time.perf_counter() - started
    return Speed(read / written_s, read / read_s)


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        _forget(file.fileno())


def _forget(file: int) -> None:
    os.fsync(file)  # what is not on the disk yet cannot be dropped
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def measured(work: Path) -> Speed:
    """Measures the disk of a work folder, and keeps the result there. Raises UserError as `measure` does."""
    make_folder(work)
    speed = measure(work)
    write_json(_kept(work), asdict(speed))
    return speed


def known(work: Path) -> Speed | None:
    """What `measured` has kept in a work folder; None where it has not run, or the file is not its own."""
    kept = read_json(_kept(work))
    values = [kept.get(name) for name in Speed.__dataclass_fields__]
    if all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0 for value in values):
        return Speed(*map(float, values))  # type: ignore[arg-type]
    return None


def _kept(work: Path) -> Path:
    return work / ".stamps" / FILE
