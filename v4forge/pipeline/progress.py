"""How far a stage is: its rate, what is left, and the memory it has had at most. Numbers and their words, no output."""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from v4forge.units import counted, duration, pace, size

# Steps that were done when the program came to them pass within this time, and so many times faster than the others.
SKIPPING_S, SKIPPING = 1.0, 10
SPACING_S, SPACING = 0.02, 1 / 200  # between two points: seconds, and as a part of the time that has passed
UNFINISHED = 0.1  # of a step, what is left of one that takes longer than those before it


@dataclass(frozen=True)
class Peak:
    """Most memory so far, in bytes: of the process, and allocated on one of its GPUs (0 without any)."""

    host: int = 0
    gpu: int = 0

    def most(self, other: Peak) -> Peak:
        return Peak(max(self.host, other.host), max(self.gpu, other.gpu))

    def __str__(self) -> str:
        return size(self.host) + (f", GPU {size(self.gpu)}" if self.gpu else "")


def _host_peak() -> int:
    """Bytes. What getrusage says is as much as the process had that started this one, where that is more."""
    try:
        with open("/proc/self/status", "rb") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(b"VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak() -> Peak:
    """Of this process. A GPU is only looked at where the program uses one already: to ask torch would wake it."""
    host = _host_peak()
    cuda = getattr(sys.modules.get("torch"), "cuda", None)  # not there yet while another thread imports it
    in_use = getattr(cuda, "is_initialized", None)
    if cuda is None or in_use is None or not in_use():
        return Peak(host)
    return Peak(host, max(cuda.max_memory_allocated(i) for i in range(cuda.device_count())))


@dataclass(frozen=True)
class Moment:
    """A moment of a stage. begun: what was done when it began, None before it has said anything. rate: steps a second
    of what this run has done; eta_s: seconds left by it; both None where nothing tells."""

    what: str
    unit: str
    total: int
    done: int
    begun: int | None
    doing: str
    elapsed_s: float
    rate: float | None
    eta_s: float | None
    peak: Peak

    def line(self) -> str:
        """While it runs: calibrate: 12/43 layers, forward, 4.3 s a layer, 2 min 13 s left, 14.2 GiB, GPU 60.0 GiB."""
        return f"{self.what}: " + ", ".join(text for _, text in self.parts() if text)

    def parts(self) -> list[tuple[str, str]]:
        """(what it is, words) in the order in which they are shown; empty words where nothing is known."""
        return [
            ("done", f"{self.done:,}/{self.total:,} {self.unit}".rstrip()),
            ("doing", self.doing),
            ("rate", pace(self.rate, self.unit) if self.rate else ""),
            ("left", f"{duration(self.eta_s)} left" if self.eta_s is not None else ""),
            ("memory", str(self.peak)),
        ]

    def facts(self) -> dict[str, Any]:
        """For an event: numbers, rounded."""
        return {
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "doing": self.doing,
            "rate": None if self.rate is None else float(f"{self.rate:.4g}"),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
            "elapsed_s": round(self.elapsed_s, 3),
            "peak_host_bytes": self.peak.host,
            "peak_gpu_bytes": self.peak.gpu,
        }

    def ended(self) -> str:
        """Behind its end: calibrate: 43 layers in 3 min 05 s, 4.3 s a layer, peak 14.2 GiB, GPU 60.0 GiB."""
        now = self.total - (self.begun or 0)
        what = counted(self.total, self.unit) if not self.begun else f"{now:,} of {counted(self.total, self.unit)}"
        rate = f", {pace(now / self.elapsed_s, self.unit)}" if now and self.elapsed_s > 0 else ""
        return f"{self.what}: {what} in {duration(self.elapsed_s)}{rate}, peak {self.peak}"

    def stopped(self, resumes: bool) -> str:
        """Behind Ctrl-C: calibrate: stopped at 12 of 43 layers; the same command goes on from there."""
        where = f"{self.done:,} of {counted(self.total, self.unit)}"
        return f"{self.what}: stopped at {where}" + ("; the same command goes on from there" if resumes else "")


Point = tuple[float, int]  # when, and how many steps were done


@dataclass
class Pace:
    """Follows a stage of `total` steps. Every method may be called from any thread."""

    what: str
    total: int
    unit: str = ""
    clock: Callable[[], float] = time.monotonic
    _started: float = 0.0
    _doing: str = ""
    _points: list[Point] = field(default_factory=list)  # the first is where it began
    _peak: Peak = Peak()
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._started = self.clock()

    def advance(self, done: int, doing: str) -> None:
        """`done` steps are finished, and `doing` is next."""
        with self._lock:
            self._doing = doing
            self._note(self.clock(), done)

    def end(self) -> None:
        """All steps are finished, whatever was said last."""
        with self._lock:
            if self._points:
                self._note(self.clock(), self.total)
            self._ended = True

    def _note(self, now: float, done: int) -> None:
        """Keeps a point, and no more of them than a rate needs."""
        if self._points and done <= self._points[-1][1]:
            return
        apart = max(SPACING_S, (now - self._started) * SPACING)
        if len(self._points) > 2 and now - self._points[-2][0] < apart:
            self._points.pop()
        self._points.append((now, done))

    def moment(self) -> Moment:
        """How far it is now."""
        with self._lock:
            now = self.clock()
            self._peak = self._peak.most(peak())
            points = self._counted(now)
            done = self.total if self._ended else points[-1][1] if points else 0
            step_s = None if self._ended else _step_s(points, now)
            return Moment(
                what=self.what,
                unit=self.unit,
                total=self.total,
                done=done,
                begun=points[0][1] if points else None,
                doing=self._doing,
                elapsed_s=now - self._started,
                rate=1 / step_s if step_s else None,
                eta_s=_left_s(points, now, self.total, step_s) if step_s else None,
                peak=self._peak,
            )

    def _counted(self, now: float) -> list[Point]:
        """The points of this run's own steps. Those of the first second are of an earlier run's where they were many
        times faster than what came then: they were only looked at."""
        first = [point for point in self._points if point[0] - self._started <= SKIPPING_S]
        if len(first) < 2 or now - self._started <= SKIPPING_S:
            return self._points
        (begun_at, begun), (at, done) = first[0], first[-1]
        before = (done - begun) / max(at - begun_at, 1e-6)
        last_at, last = self._points[-1]
        if self._ended and last == done:
            return self._points  # nothing came then: they were all there was to do
        after = (last - done) / (last_at - at) if last > done else 1 / (now - at)
        return self._points[len(first) - 1 :] if before > SKIPPING * after else self._points


def _step_s(points: list[Point], now: float) -> float | None:
    """Seconds a step over the later half of what this run has done: the first steps load libraries, and often take
    longer. A step that takes longer than those before it counts while it lasts."""
    if len(points) < 2:
        return None
    (last_at, last), begun = points[-1], points[0][1]
    earlier = (point for point in reversed(points[:-1]) if point[1] - begun <= (last - begun) / 2)
    since_at, since = next(earlier, points[0])
    return max((last_at - since_at) / (last - since), (now - since_at) / (last - since + 1)) or None


def _left_s(points: list[Point], now: float, total: int, step_s: float) -> float:
    """The step under way has had its time since the last one ended, but is not over."""
    last_at, done = points[-1]
    under_way = max(step_s - (now - last_at), step_s * UNFINISHED) if done < total else 0.0
    return max(0.0, total - done - 1) * step_s + under_way
