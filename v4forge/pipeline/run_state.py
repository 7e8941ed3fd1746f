"""A whole run as its events tell it: which stage is where, how long it has taken, and when all of it will be done.

Only the events, the time and whether the run's process lives go in; nothing is read or printed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge.files import is_locked
from v4forge.pipeline import estimate, events
from v4forge.pipeline.progress import Peak

Event = Mapping[str, Any]
WAITING, RUNNING, DONE, UP_TO_DATE, NOT_NEEDED = "waiting", "running", "done", "up to date", "not needed"
FAILED, INTERRUPTED, DIED = "failed", "interrupted", "died"
OVER = (DONE, UP_TO_DATE, NOT_NEEDED)


@dataclass
class StageView:
    """One stage. Times in seconds, memory in bytes; None where it is not known. eta_s: what is left of it."""

    stage: str
    state: str = WAITING
    done: int | None = None
    total: int | None = None
    unit: str = ""
    doing: str = ""
    elapsed_s: float | None = None
    rate: float | None = None
    eta_s: float | None = None
    estimate_s: float | None = None
    peak_host_bytes: int = 0
    peak_gpu_bytes: int = 0
    fact: str = ""
    heard_at: float = 0.0  # of its last event, in seconds since 1970
    begun_at: float | None = None

    @property
    def peak(self) -> Peak:
        return Peak(self.peak_host_bytes, self.peak_gpu_bytes)


@dataclass
class WholeRun:
    """A run. state: running, done, failed, interrupted, or died: it has neither said its end nor lives.

    eta_s: seconds left by what is known; `unknown` are the stages that are missing in it.
    """

    command: str
    title: str
    pid: int
    state: str
    started_at: float
    elapsed_s: float
    stages: list[StageView]
    eta_s: float
    unknown: tuple[str, ...]

    @property
    def running(self) -> bool:
        return self.state == RUNNING


def lock_file(work: Path, stages: Sequence[str]) -> Path:
    """What keeps a second run out of a work folder; a download may run beside one."""
    return work / ".stamps" / ("fetch.lock" if list(stages) == ["fetch"] else "lock")


def lives(work: Path, stages: Sequence[str]) -> bool:
    """Whether a process holds the lock of a run of these stages: the runner, or a stage's program that has survived it.

    The lock is taken for a moment to find out.
    """
    return is_locked(lock_file(work, stages))


def last_run(history: Sequence[Event], alive: Callable[[Sequence[str]], bool]) -> Event | None:
    """The event with which the run begins that a person asks about: the last one, but a download that was started by
    itself while another run went on is not it."""
    runs = [event for event in history if event["event"] == "run" and isinstance(event.get("stages"), list)]
    if not runs:
        return None
    last = runs[-1]
    if last["stages"] == ["fetch"]:
        whole = next((run for run in reversed(runs) if run["stages"] != ["fetch"]), None)
        if whole is not None:
            end = _end_of(whole, history)
            if alive(whole["stages"]) if end is None else events.seconds(end) >= events.seconds(last):
                return whole
    return last


def _end_of(run: Event, history: Sequence[Event]) -> Event | None:
    """Where a run says its end. Its pid may be another's later on, but not while it lives."""
    after = history[next(i for i, event in enumerate(history) if event is run) + 1 :]
    for event in after:
        if event.get("pid") == run.get("pid") and event["event"] in ("run", "run-end"):
            return event if event["event"] == "run-end" else None
    return None


def view(history: Sequence[Event], now: float, alive: Callable[[Sequence[str]], bool]) -> WholeRun | None:
    """The last run of these events (events.read) at `now`, in seconds since 1970; None where there was none. alive:
    what `lives` says of a run of these stages."""
    begun = last_run(history, alive)
    if begun is None:
        return None
    guesses = begun.get("estimates") or {}
    views = {name: StageView(name, estimate_s=guesses.get(name)) for name in begun["stages"]}
    ended = _end_of(begun, history)
    told = history[next(i for i, event in enumerate(history) if event is begun) + 1 :]
    for event in told:
        if event is ended:
            break
        if event["stage"] in views:
            _told(views[event["stage"]], event)
    stages = list(views.values())
    state = _state(ended, begun, alive)
    if state != RUNNING:
        for each in stages:
            if each.state == RUNNING:
                each.state = FAILED if state == FAILED else INTERRUPTED
    _pass_over(stages, state)
    started_at = events.seconds(begun)
    last_at = events.seconds(ended) if ended else max(each.heard_at for each in stages)
    at = max(started_at, now if state == RUNNING else last_at)
    for each in stages:
        _age(each, at)
    left = estimate.together({each.stage: _left(each) for each in stages} if state == RUNNING else {})
    return WholeRun(
        command=str(begun.get("command", "")),
        title=str(begun.get("title", "")),
        pid=int(begun.get("pid", 0)),
        state=state,
        started_at=started_at,
        elapsed_s=at - started_at,
        stages=stages,
        eta_s=left.seconds,
        unknown=left.unknown,
    )


def _state(ended: Event | None, begun: Event, alive: Callable[[Sequence[str]], bool]) -> str:
    if ended is None:
        return RUNNING if alive(begun["stages"]) else DIED
    return {0: DONE, 130: INTERRUPTED, 143: INTERRUPTED}.get(ended.get("code", 1), FAILED)


def _told(each: StageView, event: Event) -> None:
    """Takes in one event. The program's own have a total; it has ended only when the runner says so."""
    kind, by_program = event["event"], "total" in event
    each.heard_at = events.seconds(event)
    if by_program:
        for name in ("done", "total", "unit", "doing", "rate", "eta_s"):
            setattr(each, name, event.get(name))
        each.peak_host_bytes = max(each.peak_host_bytes, event.get("peak_host_bytes") or 0)
        each.peak_gpu_bytes = max(each.peak_gpu_bytes, event.get("peak_gpu_bytes") or 0)
    if event.get("fact"):
        each.fact = event["fact"]
    if kind in ("start", "progress") and each.begun_at is None:
        each.begun_at = each.heard_at - (event.get("elapsed_s") or 0)
    states = {"start": RUNNING, "progress": RUNNING, "failed": FAILED, "interrupted": INTERRUPTED}
    if kind in states:
        each.state = states[kind]
    elif kind == "up-to-date":
        each.state = UP_TO_DATE
    elif kind == "end" and not by_program:
        each.state = DONE
        each.elapsed_s = event.get("elapsed_s")
    elif kind == "end":
        each.eta_s = 0.0


def _pass_over(stages: Sequence[StageView], state: str) -> None:
    """A stage that nothing was heard of had nothing to do, once a later one was reached, or the run has ended well."""
    heard = [i for i, each in enumerate(stages) if each.state != WAITING]
    last = len(stages) if state == DONE else max(heard, default=0)
    for each in stages[:last]:
        if each.state == WAITING:
            each.state = NOT_NEEDED


def _age(each: StageView, at: float) -> None:
    """Brings what was said at `heard_at` to the time `at`."""
    if each.state == RUNNING and each.eta_s is not None:
        each.eta_s = max(0.0, each.eta_s - (at - each.heard_at))
    elif each.state != RUNNING:
        each.eta_s = None
    if each.elapsed_s is None and each.begun_at is not None:
        each.elapsed_s = max(0.0, (at if each.state == RUNNING else each.heard_at) - each.begun_at)


def _left(each: StageView) -> float | None:
    """Seconds that a stage has left: by its own progress, or by the estimate made before it began."""
    if each.state in OVER:
        return 0.0
    if each.eta_s is not None:
        return each.eta_s
    if each.estimate_s is None:
        return None
    return max(0.0, each.estimate_s - (each.elapsed_s or 0.0))
