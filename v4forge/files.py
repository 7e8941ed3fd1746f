"""Files that appear under their name only when they are whole; locks; JSON, and what to do about a file of another
form."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from v4forge.errors import UserError

# Who asks whether a file is locked holds its lock for a moment.
LOCK_ATTEMPTS, LOCK_PAUSE_S = 20, 0.05

T = TypeVar("T")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the system's refusal to write `path` an error that a user can act on."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}", "free disk space or choose another folder"
        ) from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed over it after an fsync if the block succeeds, removed if it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy on another file system; whole or not at all."""
    if target.exists() and target.samefile(source):
        return
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                raise
            shutil.copyfile(source, temporary)


@contextmanager
def exclusive(path: Path, busy: Callable[[], Exception]) -> Iterator[int]:
    """Holds a lock file. A program started with the yielded descriptor keeps holding it when its parent is killed.

    Raises busy() when another process holds the lock, UserError where the file cannot be made or locked.
    """
    make_folder(path.parent)
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(descriptor, path):
            raise busy()
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Locks an open file until it is closed -> False where another process keeps it locked.

    Raises UserError on a file system without locks.
    """
    for attempt in range(LOCK_ATTEMPTS):
        if attempt:
            time.sleep(LOCK_PAUSE_S)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
        except OSError as error:
            raise UserError(f"cannot lock {path}: {error.strerror}", "choose a SCRATCH on a local disk") from None
    return False


def is_locked(path: Path) -> bool:
    """Whether a process has a file locked now; not where there is no such file, or its file system has no locks."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def sync_folder(directory: Path) -> None:
    """Makes the names in `directory` durable."""
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folder(directory: Path) -> None:
    """Makes `directory` and its parents; UserError where something else has that name or the system refuses."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {directory}: {error.strerror}",
            "choose another folder, or move what is in its place",
        ) from None


def check_writable(folder: Path) -> None:
    """Raises UserError unless the caller can write in `folder`, or in what exists of its path."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        try:
            owner = existing.owner()
        except KeyError:
            owner = f"user {existing.stat().st_uid}"
        hint = f"sudo chown -R $(id -u):$(id -g) {existing}, or choose a folder of yours: make … SCRATCH=<folder>"
        raise UserError(f"you cannot write to {existing}, which belongs to {owner}", hint)


def remove_leftovers(directory: Path) -> None:
    """Deletes the temporary files that a killed process left in `directory`."""
    for leftover in directory.glob(".*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when there is none; a torn or foreign file counts as none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read(path: Path, hint: str) -> dict[str, Any]:
    """The object in a JSON file; raises UserError when it is missing or something else."""
    if not path.is_file():
        raise UserError(f"{path} does not exist", hint)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", hint)
    return value


def understood(path: Path, hint: str, rows: Callable[[], T]) -> T:
    """What `rows` makes of the content of `path`; raises UserError when its form is another."""
    try:
        return rows()
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]!r}", hint) from None
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(f"{path} has another form than expected: {error}", hint) from None


@contextmanager
def changed_json(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a JSON file, to be changed in the block and then written. Of processes that change the same file
    at the same time, each waits for the one before."""
    make_folder(path.parent)
    with writing(path), open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = read_json(path)
        yield content
        write_json(path, content)
