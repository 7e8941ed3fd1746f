"""From what runs to another artifact, image or setting, replica by replica, and back where one of them fails.

A replica is taken out of the router, finishes what it has, is replaced, has to be ready and to pass its probe, and is
put back; then the next. How far that is stands in a file of the folder before each step, for who goes on after a kill.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from v4forge.errors import UserError
from v4forge.files import exclusive, read_json, write_json
from v4forge.serving import client, readiness, router_control
from v4forge.serving.deployment import ROLLING, STATE, Deployment, Runtime

CUT = "cut"  # what ALLOW calls an endpoint that does not answer for a while
POLL_S = 1.0
IDLE = 2  # looks in a row that find nothing
# What does not change while a deployment runs.
FIXED = (
    *("folder", "runtime", "backend", "gpus", "bind", "port", "key_file", "cert", "cert_key", "drain_s", "metrics"),
    "compose",
)
STOP = "make serve-stop, make serve"


@dataclass
class Progress:
    """How far the way to `after` is: the replicas that may be made of it, in order, and those that have passed."""

    after: Deployment
    moved: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return Path(self.after.folder) / ROLLING

    def save(self) -> None:
        write_json(self.path, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Progress | None:
        """The way that was cut off in this folder, None where there is none."""
        if not (folder / ROLLING).exists():
            return None
        try:
            kept = read_json(folder / ROLLING)
            return cls(Deployment(**kept["after"]), kept["moved"], kept["passed"])
        except (TypeError, KeyError):
            raise UserError(f"{folder / ROLLING} was written by another version", STOP) from None


@dataclass(frozen=True)
class Roll:
    """`runtime_of` keeps a deployment; `prove` raises UserError unless a replica becomes ready and passes its probe;
    `cut`: whether no replica at all may be ready for a while."""

    runtime_of: Callable[[Deployment], Runtime]
    prove: Callable[[Runtime, int], None]
    say: Callable[[str], None]
    cut: bool = False

    def run(self, before: Deployment, after: Deployment) -> None:
        """Makes every replica of `before`, which runs, one of `after`. Raises UserError where one fails; those that
        were moved are as before then."""
        folder = Path(before.folder)
        busy = UserError(f"the replicas of {folder} are being changed already", "wait for that, then the same again")
        with exclusive(folder / f"{ROLLING}.lock", lambda: busy):
            progress = Progress.load(folder) or Progress(after)
            if progress.after.content == before.content:  # cut off when all was done
                self.runtime_of(before).reload()
                progress = Progress(after)
            if before.content == after.content:
                self._go_back(before, progress)
                return
            if progress.after.content != after.content:
                fact = "a change to other replicas was cut off"
                raise UserError(fact, f"that command again goes on, the one of before goes back; or {STOP}")
            try:
                self._go_on(before, progress)
            except Exception as error:
                self._check_kept(folder)
                self.say(f"serve: going back: {error}")
                self._go_back(before, progress)
                if not isinstance(error, UserError):
                    raise
                raise UserError(f"{error.fact}; all replicas are as before", error.hint) from None
            after.save()
            if before.router_configuration() != after.router_configuration():  # its limits follow from the settings
                self.runtime_of(after).reload()
            progress.path.unlink()

    def _go_on(self, before: Deployment, progress: Progress) -> None:
        servers = router_control.servers(before)
        left = [number for number in range(before.replicas) if number not in progress.passed]
        for number in sorted(left, key=lambda number: servers[number].serves):  # first what serves nothing anyway
            self._check_others(before, number)
            progress.moved = [*(moved for moved in progress.moved if moved != number), number]
            progress.save()
            self._move(before, number, progress.after)
            progress.passed.append(number)
            progress.save()

    def _go_back(self, before: Deployment, progress: Progress) -> None:
        for number in reversed(list(progress.moved)):
            self._check_others(before, number)
            progress.passed = [passed for passed in progress.passed if passed != number]
            progress.save()
            self._move(before, number, before)
            progress.moved.remove(number)
            progress.save()
        before.write_router()
        progress.path.unlink(missing_ok=True)

    def _move(self, before: Deployment, number: int, to: Deployment) -> None:
        """Makes a replica one of `to`; the router stays that of `before`."""
        name, runtime = before.names[number], self.runtime_of(to)
        self.say(f"serve: {name} takes nothing new")
        router_control.take_out(before, number)
        self._drain(before, number)
        self._check_kept(Path(before.folder))
        self.say(f"serve: {name} is started with {to.artifact}")
        runtime.replace(name)
        self.prove(runtime, number)
        router_control.put_back(before, number)
        self.say(f"serve: {name} serves again")

    def _drain(self, deployment: Deployment, number: int) -> None:
        """Returns when a replica has had nothing left for a while, as a request may be on its way, or DRAIN seconds
        have passed."""
        end = time.monotonic() + deployment.drain_s
        idle = 0
        while True:
            time.sleep(POLL_S)
            left = requests(deployment, number)
            idle = 0 if left else idle + 1
            if idle == IDLE:
                return
            if left and time.monotonic() > end:
                self.say(f"serve: {deployment.names[number]} still has {left} requests after {deployment.drain_s} s")
                return

    def _check_others(self, deployment: Deployment, number: int) -> None:
        """Raises UserError where nothing would answer without this replica."""
        servers = router_control.servers(deployment)
        others = [other for other, server in enumerate(servers) if server.serves and other != number]
        if self.cut or not servers[number].serves or any(readiness.ready(deployment, other) for other in others):
            return
        fact = f"without {deployment.names[number]} nothing would answer until it is back"
        raise UserError(fact, f"make serve ALLOW={CUT}, or more replicas: {STOP}")

    def _check_kept(self, folder: Path) -> None:
        """Raises UserError where the deployment was stopped meanwhile."""
        if not (folder / STATE).exists():
            raise UserError("the replicas were stopped meanwhile", "make serve")


def requests(deployment: Deployment, number: int) -> int:
    """What a replica has left to do, by the router and by itself: a router that was reloaded does not count what it had
    before, and some may ask past it."""
    routed = router_control.servers(deployment)[number].requests
    try:
        reading = client.metrics(deployment.endpoints[number])
    except UserError:
        return routed
    return max(routed, int((reading.running or 0) + (reading.waiting or 0)))


def due(before: Deployment, after: Deployment) -> bool:
    """Whether what runs is made of something else than `after`, or may be in part."""
    return before.content != after.content or (Path(before.folder) / ROLLING).exists()


def check(before: Deployment, after: Deployment) -> None:
    """Raises UserError for what cannot change while `before` runs."""
    if other := [name for name in before.differing(after) if name in FIXED]:
        raise UserError(f"other replicas run already, with another {', '.join(other)}", "make serve-stop")
    if before.serving.model != after.serving.model:
        fact = f"the replicas serve {before.serving.model}, and clients would ask {after.serving.model} of both"
        hint = f'make serve SET="served-model-name={before.serving.model}", or {STOP}'
        raise UserError(fact, hint)
