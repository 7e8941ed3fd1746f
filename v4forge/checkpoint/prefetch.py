"""Threads between disk and layer loop: the next tensors are read, and the last ones written, while it computes."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from v4forge.checkpoint import incoming
from v4forge.checkpoint.codec import DTYPES
from v4forge.checkpoint.formats import TensorSpec
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError
from v4forge.profiling import Watch

READ_THREADS = 8
READ_BYTES = 8 << 20  # a request to the disk
ALIGNMENT = 64  # of a tensor in a buffer, in bytes


@dataclass(frozen=True)
class Group:
    """Stored tensors that are read and moved together: one buffer, of which each tensor is a part."""

    buffer: Tensor  # [bytes] u8
    slots: dict[str, tuple[int, TensorSpec]]

    def on(self, device: torch.device) -> Group:
        """The same group on another device, in one copy."""
        return Group(self.buffer.to(device, non_blocking=True), self.slots)

    def tensors(self) -> dict[str, Tensor]:
        """name -> tensor, each a view of the buffer."""
        return {name: self.stacked([name])[0] for name in self.slots}

    def stacked(self, names: Sequence[str]) -> Tensor:
        """Tensors of one form that were asked for one after the other, [len(names), *shape], a view of the buffer."""
        start, spec = self.slots[names[0]]
        pitch = _aligned(spec)
        for i, name in enumerate(names):
            if self.slots[name] != (start + i * pitch, spec):
                raise ValueError(f"{name} does not lie behind {names[0]} in its group")
        part = self.buffer[start : start + len(names) * pitch].view(len(names), pitch)
        return part[:, : spec.bytes].view(DTYPES[spec.dtype]).view(len(names), *spec.shape)


def _aligned(spec: TensorSpec) -> int:
    """Bytes from one tensor of a buffer to the next."""
    return -(-spec.bytes // ALIGNMENT) * ALIGNMENT


class Reader:
    """Reads groups of stored tensors in order, on a thread, at most `ahead` bytes before they are asked for.

    `groups` lists (layer, names); buffers are pinned where `device` is a GPU. Iterating gives a Group for each, or
    raises the thread's error.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[tuple[int, Sequence[str]]],
        ahead: int,
        device: torch.device,
        watch: Watch,
    ) -> None:
        self._checkpoint, self._groups, self._device, self._watch = checkpoint, groups, device, watch
        self._ready: queue.Queue[Group | BaseException | None] = queue.Queue()  # None: there are no more
        self._room = threading.Condition()
        self._held, self._ahead = 0, ahead
        self._closed = False
        self._files: dict[str, int] = {}
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        with self._room:
            self._closed = True
            self._room.notify()
        self._thread.join()
        for file in self._files.values():
            os.close(file)

    def __next__(self) -> Group:
        group = self._ready.get()
        if not isinstance(group, Group):
            self._ready.put(group)  # for whoever asks once more
            raise group or StopIteration
        with self._room:
            self._held -= group.buffer.numel()
            self._room.notify()
        return group

    def __iter__(self) -> Iterator[Group]:
        return self

    def _run(self) -> None:
        try:
            self._read_groups()
            self._ready.put(None)
        except BaseException as error:  # handed to the consumer, who would wait for ever
            self._ready.put(error)

    def _read_groups(self) -> None:
        pin = self._device.type == "cuda"
        if pin:
            torch.cuda.set_device(self._device.index or 0)  # of this thread: pinned memory is a context's
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for layer, names in self._groups:
                if not self._arrived(layer, names):
                    return
                slots, size = {}, 0
                for name in names:
                    spec = self._checkpoint.spec(name)
                    slots[name] = (size, spec)
                    size += _aligned(spec)
                with self._room:
                    while not (self._closed or not self._held or self._held + size <= self._ahead):
                        self._room.wait()
                    self._held += size
                if self._closed:
                    return
                start = self._watch.now()
                buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
                self._fill(buffer, slots, pool)
                self._watch.add(layer, "read", "read", start, size)
                self._ready.put(Group(buffer, slots))

    def _arrived(self, layer: int, names: Sequence[str]) -> bool:
        """Waits for shards that fetch has yet to bring; False when the reader is closed meanwhile."""
        start = self._watch.now()
        arrived = self._checkpoint.arrived(names, lambda: self._closed)
        if self._watch.now() - start >= incoming.POLL_S:
            self._watch.add(layer, "fetch", "read", start, 0)
        return arrived

    def _fill(self, buffer: Tensor, slots: dict[str, tuple[int, TensorSpec]], pool: ThreadPoolExecutor) -> None:
        view = buffer.numpy().data
        jobs = []
        for name, (slot, spec) in slots.items():
            path, start = self._checkpoint.place(name)
            if path not in self._files:
                self._files[path] = open_file(path)
            size = spec.bytes
            for done in range(0, size, READ_BYTES):
                end = min(done + READ_BYTES, size)
                target = view[slot + done : slot + end]
                jobs.append(pool.submit(read_into, self._files[path], path, target, start + done))
        for job in jobs:
            job.result()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """A pool's threads are the parallelism: torch must not start more in each of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_file(path: str) -> int:
    """A file descriptor for reading; UserError where there is none. Waits for a file that fetch has yet to bring."""
    if incoming.is_coming(Path(path)):
        incoming.wait_for(Path(path))
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "restore the file, then run it again") from None


def read_into(file: int, path: str, target: memoryview, offset: int) -> None:
    """Fills `target` from `offset` of an open file on; UserError where it ends before or the disk fails."""
    while len(target):
        try:
            count = os.preadv(file, [target], offset)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", "check the disk, then run it again") from None
        if not count:
            raise UserError(f"{path} ended while it was read", "it must not change during a run; fetch it again")
        target, offset = target[count:], offset + count


def done(jobs: list[Future[None]]) -> None:
    """Waits for all jobs of a thread pool and empties the list; raises the first error."""
    while jobs:
        jobs.pop(0).result()


def on_host(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Marks tensors to be copied to the host; a writer's thread calls the value, which waits until they are there.

    The copies run beside the computation, and the tensors live until then.
    """
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: tensors
    computed = torch.cuda.Event()
    computed.record(torch.cuda.current_stream(device))

    def fetch() -> dict[str, Tensor]:
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_event(computed)
            copies = {
                name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for name, t in tensors.items()
            }
            stream.synchronize()
        return copies

    return fetch
