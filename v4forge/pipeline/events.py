"""What a run does, as lines of JSON that other programs read while it runs: `<work>/logs/events.jsonl`.

The runner names the file in the environment; every program that it starts appends to it, in containers too. A line is
one write to a file opened for appending, so that lines of several processes do not mix. Telling must never stop the
work: where it cannot be written, nothing is said. Once it is large, a run begins a new file, and one older stays.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

VARIABLE = "V4FORGE_EVENTS"
# The stage that a program runs as, where that is not its own name: two stages may be one program.
STAGE = "V4FORGE_STAGE"
LARGE_BYTES = 1 << 20  # some 3,000 lines


def file_of(work: Path) -> Path:
    """Where a work folder's events are."""
    return work / "logs" / "events.jsonl"


def older(path: Path) -> Path:
    """Where the events are that came before those of a file."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def make_room(work: Path) -> None:
    """Puts a large file aside, in the place of the older one. Not while a run of the folder lives: its first event
    would be lost with the second file after it."""
    path = file_of(work)
    with contextlib.suppress(OSError):
        if path.stat().st_size > LARGE_BYTES:
            path.replace(older(path))


@contextlib.contextmanager
def told(work: Path) -> Iterator[None]:
    """Within the block, events of this process go to the work folder's file."""
    os.environ[VARIABLE] = str(file_of(work.absolute()))
    try:
        yield
    finally:
        del os.environ[VARIABLE]


def emit(event: str, stage: str, **facts: Any) -> None:
    """Appends a line with the time, the process, the stage and the facts. Does nothing where no file is named or the
    file cannot be written; never raises."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    with contextlib.suppress(OSError, TypeError, ValueError):
        named = os.environ.get(STAGE) or stage
        line = json.dumps({"time": now, "pid": os.getpid(), "stage": named, "event": event, **facts})
        _append(path, line.encode() + b"\n")


def _append(path: str, line: bytes) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, flags, 0o644)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a file, and of the older one, oldest first; none where there is no such file. Lines that are none
    are left out: the last one may be half written, and a full disk cuts one short."""
    lines: list[bytes] = []
    for each in (older(path), path):
        with contextlib.suppress(OSError):
            lines += each.read_bytes().split(b"\n")
    return [event for line in lines if (event := _parsed(line)) is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    whole = line[max(0, line.rfind(b'{"time": ')) :]  # the next line joins one that was cut short
    try:
        value = json.loads(whole)
    except (ValueError, RecursionError):
        return None
    named = isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("time", "stage", "event"))
    return value if named and _moment(value) is not None else None


def _moment(event: Mapping[str, Any]) -> datetime | None:
    try:
        moment = datetime.fromisoformat(event["time"])
    except ValueError:
        return None
    return moment if moment.tzinfo else None


def seconds(event: Mapping[str, Any]) -> float:
    """When an event of `read` was, in seconds since 1970."""
    moment = _moment(event)
    assert moment is not None, event
    return moment.timestamp()
