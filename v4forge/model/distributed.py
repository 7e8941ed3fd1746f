"""The processes of one run, started by torchrun: samples are split over them for the forward, experts for the rest.

Every sum over tokens is made by one rank, from rows in the order of the global sample index, so that the number of
ranks changes no bit. Rows travel as bytes, over NCCL between GPUs and gloo between CPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from v4forge import launched
from v4forge.errors import UserError
from v4forge.model import rendezvous

# Of a collective. A rank that dies is noticed at once, because its connections close; what rank 0 does alone for long,
# such as to hash a source on a slow disk, is no part of it (Ranks.told_after).
TIMEOUT = timedelta(minutes=30)
PULSE_S = 60.0

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

_watch: rendezvous.Watch | None = None  # of the run that this process has joined


def _together(collective: Callable[P, T]) -> Callable[P, T]:
    """A collective that says what a user needs to know when another rank is gone."""

    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with _watch.waiting() if _watch else nullcontext():
                return collective(*args, **kwargs)
        except (RuntimeError, dist.DistError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                "another rank of this run has ended",
                "see the first error above; the same command again continues behind the last finished layer",
            ) from error

    return guarded


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run. The default is a run of one process."""

    rank: int = 0
    size: int = 1

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of `count` things in order are a rank's: neighbouring ones, as many as any other's give or take one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    @_together
    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order; small picklable values."""
        values: list[Any] = [value] * self.size
        if dist.is_initialized():
            dist.all_gather_object(values, value)
        return values

    @_together
    def told(self, value: T | None) -> T:
        """Rank 0's value, on every rank."""
        held = [value]
        if dist.is_initialized():
            dist.broadcast_object_list(held, src=0)
        return held[0]  # type: ignore[return-value]

    def told_after(self, work: Callable[[], T]) -> T:
        """What `work` returns, on every rank. Rank 0 does it, for as long as it takes: it lets the others know
        meanwhile that it lives, so that none waits for TIMEOUT."""
        if self.size == 1:
            return work()
        if self.rank:
            while self.told(None):
                pass
            return self.told(None)
        ended = Event()

        def pulse() -> None:
            with suppress(UserError):  # another rank is gone: the next `told` says so
                while not ended.wait(PULSE_S):
                    self.told(True)

        thread = Thread(target=pulse, daemon=True)
        thread.start()
        try:
            value = work()
        finally:
            ended.set()
            thread.join()
        self.told(False)
        return self.told(value)

    def barrier(self) -> None:
        """Returns when every rank has come here."""
        self.gather(None)

    @_together
    def exchange(self, rows: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """rows[r]: [n, width] for rank r -> what every rank has sent here, counts[r] rows from rank r."""
        if not dist.is_initialized():
            return list(rows)
        like = rows[0]
        row_bytes = like.shape[1] * like.element_size()
        sent = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in rows])
        received = torch.empty(sum(counts) * row_bytes, dtype=torch.uint8, device=like.device)
        dist.all_to_all_single(
            received, sent, [n * row_bytes for n in counts], [len(part) * row_bytes for part in rows]
        )
        return list(received.view(like.dtype).view(-1, like.shape[1]).split(list(counts)))

    def everyones(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """All ranks' rows, in rank order, on every rank; counts[r] is how many rank r has."""
        return torch.cat(self.exchange([rows] * self.size, counts))

    @_together
    def ordered_sum(self, terms: Iterable[Tensor], like: Tensor) -> Tensor:
        """The sum of every rank's terms, added one after the other in rank order, on every rank; formed like `like`."""
        total = torch.zeros_like(like)
        if self.rank > 0:
            terms = list(terms)  # made while the ranks before add theirs
            dist.recv(total, self.rank - 1)
        for term in terms:
            total += term
        if self.rank + 1 < self.size:
            dist.send(total, self.rank + 1)
        if dist.is_initialized():
            dist.broadcast(total, self.size - 1)
        return total


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The place that torchrun gave this process, and its device: `cuda` becomes the GPU of its local rank. What
    something else has set for ranks is ignored, with a line."""
    global _watch
    place = launched.place()
    if place is None and (line := launched.ignored()):
        log.warning("%s", line)
    if device.type == "cuda":
        local = device.index if device.index is not None else place.local_rank if place else 0
        if local >= torch.cuda.device_count():
            raise UserError(f"there is no GPU {local} here", f"start at most {torch.cuda.device_count()} processes")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if place is None:
        yield Ranks(), device
        return
    backend, bound = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    store = rendezvous.meet(place, TIMEOUT)
    _together(dist.init_process_group)(
        backend, store=store, rank=place.rank, world_size=place.size, timeout=TIMEOUT, device_id=bound
    )
    _watch = rendezvous.Watch(place, store)
    try:
        yield Ranks(place.rank, place.size), device
    finally:
        _watch.end()
        _watch = None
        dist.destroy_process_group()
