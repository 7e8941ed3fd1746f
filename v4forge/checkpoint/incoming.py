"""A checkpoint folder that fetch is filling: what belongs there, whether fetch lives, and waiting for a shard.

Beside the files, `.fetch/` holds
  plan.json   what the hub lists, with its hashes; it stays: where the files came from
  lock        locked while fetch lives, across processes and containers, and free when it was killed; its text says
              whether calibration can begin: the small files and the header of every shard are there
  headers/    the first bytes of each shard, as safetensors has them: what the shard holds, before it is here
  incoming/   what is half here

A reader of a checkpoint takes names, dtypes and shapes from a header, and waits only when it needs the bytes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open

from v4forge import launched
from v4forge.checkpoint.safetensors_header import Slice, parsed, read_head
from v4forge.errors import UserError
from v4forge.files import exclusive, is_locked, read_json, write_json

INDEX = "model.safetensors.index.json"
FOLDER = ".fetch"
READY = b"ready"
POLL_S = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expected:
    """A file of a checkpoint as its origin lists it. The hub gives a sha256 for large files, git's sha1 for small
    ones; a plain folder gives neither."""

    name: str
    bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True)
class Listing:
    """Where a checkpoint comes from, both None when that is not known, and its files by name."""

    repo: str | None
    revision: str | None
    files: dict[str, Expected]


def listing(folder: Path) -> Listing | None:
    """What fetch has written down of a checkpoint's folder; None where it has not."""
    found = read_json(folder / FOLDER / "plan.json")
    try:
        files = {name: Expected(name, **facts) for name, facts in found["files"].items()}
        return Listing(found["repo"], found["revision"], files)
    except (KeyError, TypeError, AttributeError):
        return None


def write_listing(folder: Path, found: Listing) -> None:
    files = {
        name: {"bytes": each.bytes, "sha256": each.sha256, "git_sha1": each.git_sha1}
        for name, each in found.files.items()
    }
    write_json(folder / FOLDER / "plan.json", {"repo": found.repo, "revision": found.revision, "files": files})


def header_file(folder: Path, shard: str) -> Path:
    return folder / FOLDER / "headers" / shard


def incoming(folder: Path) -> Path:
    return folder / FOLDER / "incoming"


@contextmanager
def marked(folder: Path) -> Iterator[Callable[[], None]]:
    """Marks a folder as being filled while the block runs; call the value once calibration can begin.

    Raises UserError when another fetch fills it.
    """
    busy = UserError(f"another fetch is writing to {folder}", "wait until it has ended, or choose another --out")
    with exclusive(folder / FOLDER / "lock", lambda: busy) as descriptor:
        os.ftruncate(descriptor, 0)

        def mark_ready() -> None:
            os.pwrite(descriptor, READY, 0)

        yield mark_ready


def live(folder: Path) -> bool:
    """Whether a fetch is filling the folder now."""
    return is_locked(folder / FOLDER / "lock")


def ready(folder: Path) -> bool:
    """Whether calibration can begin: what the last fetch brings is known, small files and all headers are there."""
    try:
        return (folder / FOLDER / "lock").read_bytes() == READY
    except OSError:
        return False


def is_coming(path: Path) -> bool:
    """Whether a file is not here, but a fetch is at work in its folder."""
    return not path.exists() and live(path.parent)


def _never() -> bool:
    return False


def _missing(path: Path, waited: bool) -> UserError:
    ended = ", and the fetch that was to bring it has ended" if waited else ""
    return UserError(
        f"shard {path} is missing{ended}",
        "make fetch PROFILE=flash, then the same command again: both go on where they stopped",
    )


def wait_until(
    there: Callable[[], bool], folder: Path, what: str, given_up: Callable[[], bool] = _never
) -> bool | None:
    """Waits for what fetch does in `folder`. True: it is there; False: given up; None: no fetch lives any more."""
    said = False
    while not there():
        if not live(folder):
            return True if there() else None
        if given_up():
            return False
        if not said and launched.rank() == 0:
            log.warning("waiting for %s, which fetch is bringing", what)
        said = True
        time.sleep(POLL_S)
    return True


def wait_for(path: Path, given_up: Callable[[], bool] = _never) -> bool:
    """Returns True once a shard is here, False when `given_up` says so.

    Raises UserError, at once or later, when it is not here and no fetch lives that would bring it.
    """
    began = time.monotonic()
    here = wait_until(path.exists, path.parent, path.name, given_up)
    if here is None:
        raise _missing(path, waited=time.monotonic() - began >= POLL_S)
    return here


def wait_until_ready(folder: Path) -> None:
    """Returns once a fetch that fills the folder has brought what a checkpoint is opened by, or has ended."""
    wait_until(lambda: ready(folder), folder, f"the headers of {folder}")


def digests_to_come(folder: Path, shards: Sequence[str]) -> dict[str, str]:
    """shard -> the sha256 that it will have, for those that are not here yet. Waits for one whose is not known.

    Raises UserError for one that is not here when no fetch lives that would bring it.
    """
    found: dict[str, str] = {}
    expected: Listing | None = None
    for shard in shards:
        if (folder / shard).exists():
            continue
        expected = expected or listing(folder)
        known = expected.files.get(shard) if expected else None
        if known is not None and known.sha256 is not None and live(folder):
            found[shard] = known.sha256
        else:
            wait_for(folder / shard)
    return found


def with_header(path: Path) -> Path:
    """The file that begins with a shard's header: the shard, or while it is on its way what came of it first."""
    return path if path.exists() else header_file(path.parent, path.name)


class Shard:
    """A shard that is not here yet, with the methods of safetensors' own file that a Checkpoint uses.

    Opening it reads the header; `get_tensor` waits. Raises ValueError for a header that is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = header_file(path.parent, path.name)
        wait_until(lambda: header.exists() or path.exists(), path.parent, f"the header of {path.name}")
        try:
            self._head = read_head(with_header(path))
        except FileNotFoundError:
            raise _missing(path, waited=True) from None
        expected = listing(path.parent)
        known = expected.files.get(path.name) if expected else None
        self._tensors = parsed(self._head, known.bytes if known else None)
        self._metadata = self._tensors.pop("__metadata__", None)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def get_slice(self, name: str) -> Slice:
        return Slice(self._tensors[name]["dtype"], self._tensors[name]["shape"])

    @cached_property
    def _file(self) -> Any:
        wait_for(self.path)
        if read_head(self.path) != self._head:
            raise UserError(f"the header of {self.path} came damaged before it", "run the same command again")
        return safe_open(self.path, framework="pt")

    def get_tensor(self, name: str) -> Any:
        return self._file.get_tensor(name)
