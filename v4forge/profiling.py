"""Where the time goes: named spans of a run's work, on the device's own clock where the work is the device's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Span:
    """Something that took from `start_s` to `end_s`, in seconds since the watch was made."""

    layer: int
    what: str
    lane: str  # "compute", "read" or "write"
    start_s: float
    end_s: float
    bytes: int = 0


class Watch:
    """Takes spans. On a GPU `compute` marks events in the stream and waits for nothing; `spans` then does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[Span] = []
        self._events: list[tuple[int, str, Any, Any]] = []
        self._layer = 0
        self._origin_event = self._event()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._origin_s = time.perf_counter()

    def _event(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def now(self) -> float:
        """Seconds since the watch was made."""
        return time.perf_counter() - self._origin_s

    def begin(self, layer: int) -> None:
        """What `compute` sees from here on belongs to this layer."""
        self._layer = layer

    @contextmanager
    def compute(self, what: str) -> Iterator[None]:
        """A span of the main thread's work and of what it starts on the GPU."""
        start = self._event()
        yield
        self._events.append((self._layer, what, start, self._event()))

    def add(self, layer: int, what: str, lane: str, start_s: float, size: int) -> None:
        """A span of a background thread that ends now and moved `size` bytes."""
        self._spans.append(Span(layer, what, lane, start_s, self.now(), size))

    def spans(self, layer: int | None = None) -> list[Span]:
        """All spans so far, or one layer's. Waits for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for number, what, start, end in self._events:
            if self.device.type == "cuda":
                begun = self._origin_event.elapsed_time(start) / 1e3
                ended = begun + start.elapsed_time(end) / 1e3
            else:
                begun, ended = start - self._origin_s, end - self._origin_s
            self._spans.append(Span(number, what, "compute", begun, ended))
        self._events.clear()
        return [span for span in self._spans if layer is None or span.layer == layer]


def seconds(spans: list[Span]) -> dict[str, float]:
    """what -> seconds, summed."""
    total: dict[str, float] = {}
    for span in spans:
        total[span.what] = total.get(span.what, 0.0) + span.end_s - span.start_s
    return total
