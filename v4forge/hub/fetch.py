"""Fills a folder with a checkpoint, from the hub or from another folder, every file checked before it gets its name.

Before anything else config.json, a few kilobytes, by which a model that is not supported is refused while the folder is
still as it was. Then what a checkpoint is opened by, which lets calibration begin and a wrong one be refused: the small
files, and of each shard the header. Then the shards, those that hold root and MTP tensors first, then by their lowest
layer.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from v4forge.checkpoint import incoming, layout, safetensors_header
from v4forge.checkpoint.incoming import INDEX, Expected
from v4forge.digests import Digests
from v4forge.errors import UserError
from v4forge.files import atomic_path, can_link, check_no_pointer, link_or_copy, sync_folder, writing
from v4forge.hub import partial_file
from v4forge.hub.folder_source import FolderSource
from v4forge.hub.hub_source import Hub
from v4forge.hub.partial_file import Partial
from v4forge.hub.pending import SHARD_SUFFIX, Pending, in_order, is_wanted
from v4forge.units import GB, MIB

CONFIG = "config.json"
HEADER_BYTES = 1 << 19  # asked for first of a shard; one of 1,600 tensors has a header of 200 KB
TOLD_S = 0.25

Progress = Callable[[int, str], None]


@dataclass
class Fetch:
    """One run of it. `took`: bytes that are here, by file; several threads write, each a key of its own."""

    source: Hub | FolderSource
    out: Path
    workers: int
    digests: Digests
    say: Callable[[str], None]
    took: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, pending: Pending, progress: Progress, mark_ready: Callable[[], None]) -> None:
        """Brings what is missing. Calls mark_ready once a checkpoint can be opened. Raises UserError, and then or when
        killed leaves what came so far, from which the next run goes on."""
        self._check_config(pending)
        self._count(pending)
        self._check(pending, progress)
        self._remove_former(pending)
        self._check_space(pending)
        incoming.write_listing(self.out, pending.listing)
        self._all([each for each in pending.missing if not each.name.endswith(SHARD_SUFFIX)], self._bring, progress)
        shards = in_order(self._index(pending))
        if absent := [name for name in shards if name not in pending.listing.files]:
            hint = "complete the folder, or leave out FROM= and download"
            raise UserError(f"{self._origin()} lacks {absent[0]}, which its index names", hint)
        missing = {each.name: each for each in pending.missing}
        coming = [missing[name] for name in shards if name in missing]
        self._all(coming, self._bring_header, progress)
        self._check_layout()
        mark_ready()
        self._all(coming, self._bring, progress)
        shutil.rmtree(incoming.incoming(self.out), ignore_errors=True)

    def _check_config(self, pending: Pending) -> None:
        """Refuses a model that is not supported, by config.json alone, which does not get its name yet; and a folder of
        git-LFS pointers."""
        if isinstance(self.source, FolderSource):
            for name in pending.listing.files:
                check_no_pointer(self.source.paths[name])
        expected = pending.listing.files.get(CONFIG)
        if expected is None:
            raise UserError(f"{self._origin()} has no {CONFIG}", "correct FROM=, or FLASH_REPO")
        here = self.out / CONFIG
        if isinstance(self.source, FolderSource):
            where, content = f"{self.source.folder / CONFIG}", self.source.paths[CONFIG].read_bytes()
        else:
            where = f"{CONFIG} of {self.source.repo} at {self.source.revision[:12]}"
            is_here = here.is_file() and not self._fault(here, expected)
            content = here.read_bytes() if is_here else self._downloaded(self.source, expected)
        try:
            layout.read_config(content, where)
        except UserError:
            partial_file.path_of(self.out, expected).unlink(missing_ok=True)
            with suppress(OSError):  # it may hold what else came
                incoming.incoming(self.out).rmdir()
            raise

    def _downloaded(self, source: Hub, file: Expected) -> bytes:
        """A small file, whole and checked, which `_attempt` gives its name later."""
        path = partial_file.path_of(self.out, file)
        for _ in range(source.attempts):
            with Partial(path, file) as held:
                source.bring(held, lambda size: self._took(file, size))
                fault = held.fault()
            if not fault:
                return path.read_bytes()
            path.unlink()
        raise source.blame(file.name, fault)

    def _check_layout(self) -> None:
        """Refuses what is no DeepSeek-V4 checkpoint, by the headers."""
        from v4forge.checkpoint.reader import Checkpoint  # with torch: small files are not to wait the seconds it takes

        try:
            opened = Checkpoint(self.out, by_fetch=True)
            opened.validate(layout.upstream(opened.config))
        except UserError:
            shutil.rmtree(incoming.incoming(self.out), ignore_errors=True)  # should a header have come damaged
            raise

    def _index(self, pending: Pending) -> Mapping[str, str]:
        """The weight map; shards that it does not name leave the listing, which is written anew."""
        try:
            weight_map = json.loads((self.out / INDEX).read_text(encoding="utf-8"))["weight_map"]
            named = set(weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self.out / INDEX} is not a safetensors index", "correct FROM=, or FLASH_REPO") from None
        extra = [name for name in pending.listing.files if name.endswith(SHARD_SUFFIX) and name not in named]
        for name in extra:
            del pending.listing.files[name]
        if extra:
            incoming.write_listing(self.out, pending.listing)
            self.say(f"skipped, not in the index: {', '.join(extra)}")
        return weight_map

    def _count(self, pending: Pending) -> None:
        """What an earlier run has brought."""
        for each in (*pending.here, *pending.unsure):
            self.took[each.name] = each.bytes
        for each in pending.missing:
            path = partial_file.path_of(self.out, each)
            self.took[each.name] = min(path.stat().st_size, each.bytes) if path.exists() else 0

    def _check(self, pending: Pending, progress: Progress) -> None:
        """Reads what is there and unsure; removes what is not what the source has."""

        def check(file: Expected) -> None:
            is_right = self._fault(self.out / file.name, file) == ""
            (pending.here if is_right else pending.wrong).append(file)

        self._all(pending.unsure, check, progress, "checking what is there")
        pending.unsure.clear()
        for each in pending.wrong:
            self.say(f"{self.out / each.name} is not what {self._origin()} has: replaced")
            (self.out / each.name).unlink(missing_ok=True)
            self.took[each.name] = 0
        self.finished = len(pending.here)

    def _fault(self, path: Path, file: Expected) -> str:
        """What is wrong with a file; hashes it where its digest is not known."""
        if file.sha256 is not None:
            found = self.digests.of([path])[path]
            return "" if found == file.sha256 else f"sha256 {found}, not {file.sha256}"
        if file.git_sha1 is None:
            return ""
        blob = partial_file.git_blob(file.bytes)
        blob.update(path.read_bytes())
        return "" if blob.hexdigest() == file.git_sha1 else f"git sha1 {blob.hexdigest()}, not {file.git_sha1}"

    def _remove_former(self, pending: Pending) -> None:
        """Removes what an earlier fetch brought, or had begun to bring, of another revision, and this one does not
        have: a stage would take a small file for this revision's, and a shard takes its gigabytes."""
        before = incoming.listing(self.out)
        for name in sorted(before.files.keys() - pending.listing.files.keys() if before else ()):
            path = self.out / name
            if is_wanted(name) and path.is_file():
                self.say(f"{path} is of an earlier fetch, {self._origin()} has none: removed")
                path.unlink()
        begun = {partial_file.path_of(self.out, each) for each in pending.missing}
        for path in incoming.incoming(self.out).glob("*"):
            if path not in begun:
                path.unlink()

    def _check_space(self, pending: Pending) -> None:
        needed = sum(each.bytes - self.took[each.name] for each in pending.missing)
        if isinstance(self.source, FolderSource) and self._links(self.source):
            return
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise UserError(
                f"{self.out} has {free / GB:,.1f} GB free, the checkpoint takes {needed / GB:,.1f} GB more:"
                f" {(needed - free) / GB:,.1f} GB are missing",
                "free that much there, or choose a larger disk: make … SCRATCH=<folder>",
            )

    def _links(self, source: FolderSource) -> bool:
        """Whether files of the source's folder can be linked here: not across file systems, nor across a container's
        mounts of one, nor always those of another user."""
        return can_link(source.paths[INDEX], incoming.incoming(self.out))

    def _origin(self) -> str:
        return f"{self.source.folder}" if isinstance(self.source, FolderSource) else "the hub"

    @property
    def took_mib(self) -> int:
        return sum(list(self.took.values())) // MIB

    def _all(
        self, files: Sequence[Expected], action: Callable[[Expected], None], progress: Progress, doing: str = ""
    ) -> None:
        """Does it for all files, some at a time, in their order; the first error ends the others."""
        progress(self.took_mib, doing or self._so_far())
        with self._pool() as pool:
            jobs: set[Future[None]] = {pool.submit(action, each) for each in files}
            while jobs:
                done, jobs = wait(jobs, TOLD_S, FIRST_EXCEPTION)
                for job in done:
                    job.result()
                progress(self.took_mib, doing or self._so_far())

    def _so_far(self) -> str:
        return f"{self.finished} of {len(self.took)} files"

    @contextmanager
    def _pool(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that stop at the next bytes when the block fails."""
        pool = ThreadPoolExecutor(self.workers, "fetch")
        try:
            yield pool
        except BaseException:
            if isinstance(self.source, Hub):
                self.source.stop.set()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self.digests.save()

    def _bring(self, file: Expected) -> None:
        """One file, checked, under its name."""
        for attempt in range(self.source.attempts):
            fault = self._attempt(file)
            if not fault:
                break
            incoming.header_file(self.out, file.name).unlink(missing_ok=True)
            if attempt + 1 < self.source.attempts:
                self.say(f"{file.name} came damaged ({fault}): once more")
        else:
            raise self.source.blame(file.name, fault)
        with self._lock:
            self.finished += 1

    def _attempt(self, file: Expected) -> str:
        """Brings a file, and gives it its name unless something is wrong with it, which is the value."""
        path, target = partial_file.path_of(self.out, file), self.out / file.name
        if isinstance(self.source, FolderSource):
            return self._take(self.source, file, path, target)
        with Partial(path, file) as held:
            self.source.bring(held, lambda size: self._took(file, size))
            fault = held.fault()
            if not fault:
                held.publish(target)
        if fault:
            path.unlink()
            self.took[file.name] = 0
        else:
            self._learn(target, held.sha256)
        return fault

    def _take(self, source: FolderSource, file: Expected, path: Path, target: Path) -> str:
        """A file of a folder, linked or copied; what is wrong with it, and then it does not get its name."""
        origin = source.paths[file.name]
        link_or_copy(origin, path)
        if not path.samefile(origin):
            os.utime(path, ns=(origin.stat().st_atime_ns, origin.stat().st_mtime_ns))
        if fault := self._fault(path, file):
            path.unlink()
            return fault
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
            sync_folder(target.parent)
        if file.sha256 is not None:
            self._learn(target, file.sha256)
        self._took(file, file.bytes)
        return ""

    def _bring_header(self, file: Expected) -> None:
        """The first bytes of a shard, of which nothing is asked for twice: the shard goes on behind them."""
        for attempt in range(self.source.attempts):
            try:
                head = self._head(file)
                safetensors_header.parsed(head, file.bytes)
                break
            except (ValueError, RecursionError) as error:
                if isinstance(self.source, Hub):
                    partial_file.path_of(self.out, file).unlink()
                if attempt + 1 == self.source.attempts:
                    fact = f"{file.name} of {self._origin()} is not a safetensors file: {error}"
                    raise UserError(fact, "correct FROM=, or FLASH_REPO") from None
        with atomic_path(incoming.header_file(self.out, file.name)) as temporary:
            temporary.write_bytes(head)

    def _head(self, file: Expected) -> bytes:
        if isinstance(self.source, FolderSource):
            return safetensors_header.read_head(self.source.paths[file.name])
        path = partial_file.path_of(self.out, file)
        with suppress(OSError, ValueError):
            return safetensors_header.read_head(path)  # of what came earlier, which need not be hashed for it
        with Partial(path, file) as held:
            self.source.bring(held, lambda size: self._took(file, size), min(HEADER_BYTES, file.bytes))
            needed = safetensors_header.head_bytes(_first(path, 8))
            self.source.bring(held, lambda size: self._took(file, size), min(needed, file.bytes))
        return safetensors_header.read_head(path)

    def _took(self, file: Expected, size: int) -> None:
        self.took[file.name] = size

    def _learn(self, path: Path, sha256: str) -> None:
        """Lets nobody hash the file again, whatever becomes of this run."""
        with self._lock:
            self.digests.learn(path, sha256)
            self.digests.save()


def _first(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)
