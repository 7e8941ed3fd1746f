"""Files that appear under their name only when they are whole; locks; JSON, and what to do about a file of another
form."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from v4forge.errors import UserError

# Who asks whether a file is locked holds its lock for a moment.
LOCK_ATTEMPTS, LOCK_PAUSE_S = 20, 0.05

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
LFS_POINTER = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
LFS_POINTER_BYTES = 1024  # at most

T = TypeVar("T")

ROOM = "free disk space or choose another folder"
LOCAL_DISK = "choose a SCRATCH on a local disk"
OTHER_FOLDER = "choose another folder, or move what is in its place"
BROKEN = "sudo dmesg | tail says what is wrong with the disk, or with the network to it"
# What helps against a refusal to write, by its errno.
HELP = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "ls -ld {folder} says whose it is; choose a folder of yours"),
    **dict.fromkeys(
        (errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN), BROKEN
    ),
    **dict.fromkeys((errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK), LOCAL_DISK),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "ulimit -n 65536, then the same command again"),
    errno.EROFS: "choose a folder on a file system that can be written: make … SCRATCH=<folder>",
    errno.ENAMETOOLONG: "choose a folder with a shorter path",
}
# How a file system says that it cannot make an fsync of what is asked for.
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes the system's refusal to write `path` an error that a user can act on, with the system's own reason."""
    try:
        yield
    except OSError as error:
        raise refused(path, error) from None


def refused(path: Path, error: OSError) -> UserError:
    """The error for what could not be written; it names the other file where it is that one's fault."""
    why = error.strerror or str(error)
    if isinstance(error.filename, str) and not _of(path, error.filename):
        why = f"{error.filename}: {why}"
    hint = HELP.get(error.errno or 0, OTHER_FOLDER)
    return UserError(f"cannot write {path}: {why}", hint.format(folder=shlex.quote(str(path.parent))))


def _of(path: Path, name: str) -> bool:
    """Whether `name` is `path`, a temporary file of it, or a folder of its path."""
    found = Path(name)
    return found == path or found in path.parents or (found.parent == path.parent and path.name in found.name)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed over it after an fsync if the block succeeds, removed if it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                sync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, or a copy where the system makes no link; whole or not at all.

    Not across file systems, nor a container's mounts of one; not on many that are of a network or in user space; not of
    another user's file.
    """
    if target.exists() and target.samefile(source):
        return
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # should it be the source's fault, the copy says so
            shutil.copyfile(source, temporary)


def can_link(source: Path, folder: Path) -> bool:
    """Whether `source` can be linked into `folder`, which is made."""
    probe = folder / f".{os.getpid()}.link.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.link(source, probe)
    except OSError:
        return False
    probe.unlink()
    return True


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
            raise _unlockable(path, error) from None
    return False


def _unlockable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot lock {path}: {error.strerror}: its file system has no locks", LOCAL_DISK)


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
    with writing(directory):
        folder = os.open(directory, os.O_RDONLY)
        try:
            sync(folder)
        finally:
            os.close(folder)


def sync(descriptor: int) -> None:
    """Makes what was written durable, where the file system can: some of networks and in user space cannot."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def make_folder(directory: Path) -> None:
    """Makes `directory` and its parents; UserError where something else has that name or the system refuses."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {directory}: {error.strerror}",
            HELP.get(error.errno or 0, OTHER_FOLDER).format(folder=shlex.quote(str(directory.parent))),
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


def is_pointer(path: Path) -> bool:
    """Whether git-LFS left its pointer in a file's place; not where the file cannot be read."""
    try:
        with open(path, "rb") as file:
            content = file.read(LFS_POINTER_BYTES + 1)
    except OSError:
        return False
    return len(content) <= LFS_POINTER_BYTES and content.startswith(LFS_POINTER)


def check_no_pointer(path: Path) -> None:
    """Raises UserError where git-LFS left its pointer in a file's place."""
    if is_pointer(path):
        fact = f"{path} is a git-LFS pointer, {path.stat().st_size} bytes that say what belongs there"
        raise UserError(fact, f"cd {shlex.quote(str(path.parent))} && git lfs pull, then the same command again")


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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _unlockable(path, error) from None
        content = read_json(path)
        yield content
        write_json(path, content)
