"""How the ranks of a run find each other, and what a rank that waits says: for whom, and how long already."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Thread

import torch.distributed as dist

from v4forge import launched
from v4forge.errors import UserError
from v4forge.launched import INTERFACE, Place

# Until all have come: the first import of torch from a network's disk takes minutes.
JOIN_LIMIT_S = 600.0
TOLD_S = 10.0  # between two lines of who waits for somebody to come
POLL_S = 0.05
# In a collective: how often ranks say where they are, and how long one waits before it says so.
PULSE_S, PATIENCE_S = 15.0, 30.0

log = logging.getLogger(__name__)


def meet(place: Place, limit: timedelta) -> dist.Store:
    """The store that every rank has come to. Says every TOLD_S for whom this one waits. Raises UserError for an address
    that leads nowhere, and for ranks that do not come."""
    launched.check_interface()
    if place.all_here:
        os.environ.setdefault(INTERFACE, "lo")  # gloo would ask for the machine's own name, which may not resolve
    address = _address(place)
    where = f"{address}:{place.port}"
    started, told = time.monotonic(), time.monotonic()

    def tell(absent: Sequence[int]) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= TOLD_S:
            told = now
            log.warning("rank %d waits for %s of %d at %s (%.0f s)", *_who(place, absent, where), now - started)
        if now - started > JOIN_LIMIT_S:
            fact = f"{_named(absent)} of {place.size} did not come to {where} within {JOIN_LIMIT_S:.0f} s"
            raise UserError(fact, f"see the first error above, or start the ranks together: {launched.START}")

    store = _opened(place, address, limit, lambda: tell([0]))
    store.set(f"here/{place.rank}", "1")
    while absent := [rank for rank in range(place.size) if not store.check([f"here/{rank}"])]:
        if place.rank == min(set(range(place.size)) - set(absent)) or time.monotonic() - started > JOIN_LIMIT_S:
            tell(absent)  # of those that are here, one says so
        time.sleep(POLL_S)
    return store


def _who(place: Place, absent: Sequence[int], where: str) -> tuple[int, str, int, str]:
    return place.rank, _named(absent), place.size, where


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _address(place: Place) -> str:
    """Where the ranks meet. torchrun gives the machine's own name, which need not resolve."""
    if launched.resolves(place.address):
        return place.address
    if place.all_here:
        if place.rank == 0:
            log.warning(
                "MASTER_ADDR=%s does not resolve: the ranks, all of them here, meet at 127.0.0.1", place.address
            )
        return "127.0.0.1"
    fact = f"MASTER_ADDR={place.address} does not resolve"
    raise UserError(fact, f"getent hosts {place.address}; or torchrun --local-addr <this machine's address> …")


def _opened(place: Place, address: str, limit: timedelta, tell: Callable[[], None]) -> dist.Store:
    """The store, which torchrun keeps, or else rank 0."""
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = place.rank == 0 and not by_torchrun
    while True:
        try:
            store = dist.TCPStore(
                address, place.port, None, is_master, timeout=timedelta(seconds=TOLD_S), wait_for_workers=False
            )
            break
        except (RuntimeError, dist.DistError) as error:
            if is_master:
                fact = f"port {place.port} of {address}, where the ranks are to meet, cannot be opened"
                raise UserError(fact, f"start the ranks together: {launched.START}") from error
            tell()
    store.set_timeout(limit)
    return dist.PrefixStore(f"ranks/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Watch:
    """Tells, while this rank waits in a collective, which ranks have not come there; by a thread of its own."""

    def __init__(self, place: Place, store: dist.Store) -> None:
        self._place, self._store = place, store
        self._entered, self._since = 0, 0.0
        self._ended = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective."""
        self._entered += 1
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = 0.0

    def end(self) -> None:
        self._ended.set()
        self._thread.join(PULSE_S)

    def _run(self) -> None:
        said_s = 0.0  # how long the last line said
        with suppress(RuntimeError, dist.DistError):  # the store is gone: so is the run
            while not self._ended.wait(PULSE_S):
                entered, since = self._entered, self._since
                self._store.set(f"entered/{self._place.rank}", str(entered))
                waited_s = time.monotonic() - since if since else 0.0
                if waited_s < PATIENCE_S:
                    said_s = 0.0
                elif waited_s >= 2 * said_s and (absent := self._absent(entered)):
                    said_s = waited_s
                    log.warning("rank %d waits for %s (%.0f s)", self._place.rank, _named(absent), waited_s)

    def _absent(self, entered: int) -> list[int]:
        """The ranks that are not where this one is; none where a lower rank says so."""
        behind = [rank for rank in range(self._place.size) if self._of(rank) < entered]
        speaker = min(set(range(self._place.size)) - set(behind), default=self._place.rank)
        return behind if speaker == self._place.rank else []

    def _of(self, rank: int) -> int:
        key = f"entered/{rank}"
        return int(self._store.get(key)) if self._store.check([key]) else 0
