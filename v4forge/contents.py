"""The digests of a folder's files, read once and remembered. Standard library only.

What is remembered of a file is trusted while its inode, size, time of change and time of status change, which no
program can set, are those that it was read with. Digests of the stages' stamps, which do not know the last, are
trusted for a file of which nothing is remembered. The memory lies beside the folder, or in the user's cache where
nothing can be written there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from v4forge import digests
from v4forge.digests import HASH_THREADS, Digests, cache_of
from v4forge.errors import UserError
from v4forge.files import changed_json, read_json
from v4forge.units import MB

FILE = "contents.json"

Identity = list[int]  # inode, size, mtime_ns, ctime_ns
# (what, total, unit, resumes) -> a block that is called with (done, what comes next); scripts.cli.steps is one.
Steps = Callable[..., AbstractContextManager[Callable[[int, str], None]]]


@contextmanager
def silent(_what: str, _total: int, _unit: str = "", **_: bool) -> Iterator[Callable[[int, str], None]]:
    """Shows no progress."""
    yield lambda _done, _doing: None


def memory_file(folder: Path) -> Path | None:
    """Where the digests of a folder's files are remembered: <parent>/.stamps, else the user's cache; None where nothing
    can be written in either."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places = [Path(os.path.realpath(folder)).parent / ".stamps"]
    places += [Path(cache, "v4forge")] if os.path.isabs(cache) else []
    for place in places:
        if os.access(next(path for path in (place, *place.parents) if os.path.exists(path)), os.W_OK | os.X_OK):
            return place / FILE
    return None


class Memory:
    """Digests of a folder's files, in a JSON file that other folders' are in too. Several processes may use one file.

    `folder` is known by where it really is, so that a link to it is the same folder. Nothing that goes wrong with
    `file` is an error: then the files are read again. Several threads may use one object.
    """

    def __init__(self, folder: Path, file: Path | None = None) -> None:
        self.folder = os.path.realpath(folder)
        self.file = file or memory_file(folder)
        self.failure = ""  # why nothing is remembered
        self._changing = threading.Lock()
        self._entries: dict[str, list[Any]] = {}
        self.reload()

    def reload(self) -> None:
        """Takes in what other processes have remembered."""
        found = read_json(self.file).get(self.folder) if self.file else None
        if isinstance(found, dict):
            self._entries |= {name: entry for name, entry in found.items() if _is_entry(entry)}

    def known(self, path: Path) -> str | None:
        """The sha256 of a file as it is now, if it is remembered."""
        entry = self._entries.get(path.name)
        return entry[-1] if entry and entry[:-1] == identity(path) else None

    def touched(self, path: Path) -> bool:
        """Whether something happened to a file that only its time of status change tells."""
        entry, now = self._entries.get(path.name), identity(path)
        return entry is not None and entry[:3] == now[:3] and entry[:-1] != now

    def learn(self, found: Mapping[str, tuple[Identity, str]]) -> None:
        """Remembers (identity, sha256) of files by name, at once."""
        added = {name: [*what, sha256] for name, (what, sha256) in found.items()}
        with self._changing:
            self._entries |= added
            if self.file is None or self.failure:
                return
            try:
                with changed_json(self.file) as content:
                    for folder in [folder for folder in content if not os.path.isdir(folder)]:
                        del content[folder]
                    own = content.get(self.folder)
                    content[self.folder] = (own if isinstance(own, dict) else {}) | added
            except (UserError, OSError) as error:
                self.failure = str(error)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(each) for each in entry] == [int, int, int, int, str]


def identity(path: Path) -> Identity:
    """By what a file is known again. Raises OSError where there is none."""
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def of(names: Sequence[str], memory: Memory, steps: Steps = silent, anew: bool = False) -> dict[str, str]:
    """name -> sha256 of files of the memory's folder: remembered, or known to the stamps, or else read, by all cores.

    Each is remembered as soon as it is read, so that an interrupted call goes on where it stopped; a second one at the
    same time waits for the first and reads nothing again. anew: read all of them. Raises UserError for a file that
    cannot be read or changes meanwhile.
    """
    paths = {name: Path(memory.folder, name) for name in names}
    with _alone(memory, steps):
        memory.reload()
        stamps = Digests(cache_of(Path(memory.folder).parent))
        found: dict[str, str] = {}
        learnt: dict[str, tuple[Identity, str]] = {}
        try:
            for name, path in paths.items() if not anew else ():
                if sha256 := memory.known(path):
                    found[name] = sha256
                elif not memory.touched(path) and (sha256 := stamps.known(path)):
                    found[name] = sha256
                    learnt[name] = (identity(path), sha256)
            unread = {name: path.stat().st_size for name, path in paths.items() if name not in found}
        except OSError as error:
            raise _unreadable(error) from None
        if learnt:
            memory.learn(learnt)
        return found | (_read(unread, paths, memory, steps) if unread else {})


def _read(sizes: Mapping[str, int], paths: Mapping[str, Path], memory: Memory, steps: Steps) -> dict[str, str]:
    """name -> sha256 of the files of `sizes`, the largest first."""
    stopped, lock, done, found = threading.Event(), threading.Lock(), 0, {}
    with steps("certificate", sum(sizes.values()) // MB, "MB", resumes=True) as advance:

        def progress(count: int) -> None:
            nonlocal done
            if stopped.is_set():
                raise InterruptedError
            with lock:
                done += count
            advance(done // MB, "reading what was certified")

        def digest(name: str) -> tuple[str, Identity, str]:
            path = paths[name]
            before = identity(path)
            sha256 = digests.file_sha256(path, progress)
            if identity(path) != before:
                raise UserError(f"{path} changed while it was read", "the same command again, once it is written")
            return name, before, sha256

        with ThreadPoolExecutor(HASH_THREADS) as pool:
            jobs = [pool.submit(digest, name) for name in sorted(sizes, key=lambda name: -sizes[name])]
            try:
                for job in as_completed(jobs):
                    name, what, sha256 = job.result()
                    memory.learn({name: (what, sha256)})
                    found[name] = sha256
            except OSError as error:
                raise _unreadable(error) from None
            finally:  # whatever ends it, no thread goes on reading
                stopped.set()
                pool.shutdown(cancel_futures=True)
    return found


def _unreadable(error: OSError) -> UserError:
    return UserError(f"{error.filename or 'a file'} cannot be read: {error.strerror}", "sudo dmesg, then copy it again")


@contextmanager
def _alone(memory: Memory, steps: Steps) -> Iterator[None]:
    """Holds a lock on the memory's folder, where there can be one."""
    if memory.file is None:
        yield
        return
    name = hashlib.sha256(memory.folder.encode()).hexdigest()[:12]
    descriptor = None
    with suppress(OSError):  # a folder that cannot be made, a file system without locks: then each reads by itself
        memory.file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(memory.file.with_name(f".contents.{name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with steps("certificate", 1, "run", resumes=True) as advance:
                advance(0, "waits for another that reads the same")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
