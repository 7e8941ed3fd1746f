"""What is made once and read by many tests, in whichever worker of a parallel run they are.

`in_session` makes a folder for one run of pytest; `kept` one that later runs find again, in pytest's cache, by a key of
all that determines it. Nobody may write into either, but programs that are made to share a folder, as those that keep
caches.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def in_session(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of this run, which `make` has filled."""
    return _made(_of_the_run(factory) / name, make)


def _of_the_run(factory: pytest.TempPathFactory) -> Path:
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def kept(cache: pytest.Cache, name: str, parts: list[bytes], make: Callable[[Path], None]) -> Path:
    """The folder `name` of these `parts` in pytest's cache; those of other parts are removed."""
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
    folder = cache.mkdir(name)
    with FileLock(folder / "lock"):
        for other in folder.iterdir():
            if other.is_dir() and not other.name.startswith(key):  # one of this key may be in the making
                shutil.rmtree(other)
    return _made(folder / key, make)


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder
