"""v4forge.pipeline.events: lines that several processes append, and a reader that takes what is whole."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from v4forge.pipeline import events


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(events.STAGE, raising=False)
    monkeypatch.setenv(events.VARIABLE, str(events.file_of(tmp_path)))
    return events.file_of(tmp_path)


def test_an_event_is_one_line_with_its_time_process_stage_and_facts(log: Path) -> None:
    events.emit("progress", "calibrate", done=3, total=43)
    (line,) = log.read_text().splitlines()
    event = json.loads(line)
    assert event.pop("time").endswith("+00:00")
    assert event == {"pid": os.getpid(), "stage": "calibrate", "event": "progress", "done": 3, "total": 43}


def test_the_stage_is_what_the_program_runs_as(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(events.STAGE, "rtn")
    events.emit("start", "calibrate")
    assert [event["stage"] for event in events.read(log)] == ["rtn"]


def test_lines_of_several_writers_do_not_mix(log: Path) -> None:
    def write(number: int) -> None:
        for count in range(50):
            events.emit("progress", f"stage {number}", done=count, doing="x" * 400)

    children = []
    for number in range(2):
        if (pid := os.fork()) == 0:
            write(number)
            os._exit(0)
        children.append(pid)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (2, 3)))
    assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in children)
    found = events.read(log)
    assert len(found) == 200
    for number in range(4):
        assert [event["done"] for event in found if event["stage"] == f"stage {number}"] == list(range(50))


def test_without_a_file_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(events.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    events.emit("start", "calibrate")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["a file/logs/events.jsonl", "a folder", ""])
def test_a_place_that_cannot_be_written_stops_nothing(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "a folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(events.VARIABLE, path)
    events.emit("start", "calibrate")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a file", "a folder"]
    assert not any((tmp_path / "a folder").iterdir())


def test_facts_that_are_no_json_stop_nothing(log: Path) -> None:
    events.emit("failed", "calibrate", fact=object())
    events.emit("end", "calibrate")
    assert [event["event"] for event in events.read(log)] == ["end"]


def test_torn_and_foreign_lines_are_left_out(log: Path) -> None:
    events.emit("start", "calibrate")
    whole = log.read_text()
    foreign = ["null", "[1]", '{"stage": 1}', "\x00\xff", '{"time": "noon", "stage": "", "event": "x"}', "[" * 100_000]
    torn = whole[: len(whole) // 2]
    log.write_text("\n".join([*foreign, torn + whole.strip(), whole.strip(), torn]), encoding="utf-8")
    assert events.read(log) == [json.loads(whole)] * 2


def test_a_large_file_makes_room_and_what_it_held_is_still_read(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(count: int) -> None:
        events.emit("progress", "calibrate", done=count, doing="x" * 400)
        events.make_room(tmp_path)

    told(0)
    assert not events.older(log).exists()
    monkeypatch.setattr(events, "LARGE_BYTES", 100)
    told(1)
    assert events.older(log).exists() and not log.exists()
    events.emit("end", "calibrate")
    assert [event.get("done") for event in events.read(log)] == [0, 1, None]
    told(2)
    assert [event.get("done") for event in events.read(log)] == [None, 2]  # one older file stays


def test_a_file_that_is_not_there_has_no_events(tmp_path: Path) -> None:
    assert events.read(tmp_path / "events.jsonl") == []
