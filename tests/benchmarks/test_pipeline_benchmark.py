"""benchmarks.pipeline: what it takes from a run's own records."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import pipeline
from v4forge.errors import UserError
from v4forge.pipeline import events


def test_a_round_has_the_seconds_of_the_record_and_the_most_memory_of_the_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "tiny"
    (work / "reports").mkdir(parents=True)

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert {"calibrate", "card", "report"} < set(command)
        (work / "reports/run.json").write_text(json.dumps({"verify": {"elapsed_s": 3.5}}))
        monkeypatch.setenv(events.VARIABLE, str(events.file_of(work)))
        for peak in (5, 9, 7):
            events.emit("progress", "verify", peak_host_bytes=peak)
        return SimpleNamespace(returncode=0)

    monkeypatch.delenv(events.STAGE, raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    seconds, memory = pipeline.round_of(tmp_path)
    assert seconds == {"verify": 3.5} and memory["verify"] == 9


def test_a_stage_that_fails_ends_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match="a stage failed"):
        pipeline.round_of(tmp_path)
