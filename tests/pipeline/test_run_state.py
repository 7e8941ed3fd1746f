"""v4forge.pipeline.run_state and scripts.status: a run as its events tell it, for a person in another terminal."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from programs import run_here

from v4forge.pipeline import events, run_state
from v4forge.pipeline.run_state import WholeRun

STAGES = ["fetch", "calibrate", "postprocess", "verify"]
BEGUN_AT = 1_800_000_000.0
RUNNER, PROGRAM = 100, 200


def at(seconds: float, stage: str, event: str, pid: int = RUNNER, **facts: Any) -> dict[str, Any]:
    moment = datetime.fromtimestamp(BEGUN_AT + seconds, timezone.utc).isoformat(timespec="milliseconds")
    return {"time": moment, "pid": pid, "stage": stage, "event": event, **facts}


def begun(stages: Sequence[str] = STAGES, seconds: float = 0, pid: int = RUNNER, **estimates: float | None) -> Any:
    known = {name: estimates.get(name) for name in stages}
    command = "make artifact PROFILE=flash"
    return at(seconds, "", "run", pid, stages=list(stages), title="artifact", command=command, estimates=known)


def progress(seconds: float, stage: str, done: int, total: int, **facts: Any) -> dict[str, Any]:
    given = {"done": done, "total": total, "unit": "layers", "doing": "forward", "rate": None, "eta_s": None}
    return at(seconds, stage, "progress", PROGRAM, **given | facts)


def seen(history: list[dict[str, Any]], seconds: float, alive: bool = True) -> WholeRun:
    found = run_state.view(history, BEGUN_AT + seconds, lambda _stages: alive)
    assert found is not None
    return found


def states(run: WholeRun) -> dict[str, str]:
    return {each.stage: each.state for each in run.stages}


ESTIMATED = begun(fetch=0.0, calibrate=200.0, postprocess=30.0, verify=300.0)
CALIBRATING = [
    ESTIMATED,
    at(1, "fetch", "up-to-date"),
    at(2, "calibrate", "start"),
    at(12, "calibrate", "start", PROGRAM, done=0, total=43, unit="layers", elapsed_s=0.0),
    progress(60, "calibrate", 12, 43, rate=0.25, eta_s=124.0, peak_host_bytes=5, peak_gpu_bytes=7),
]


def test_the_stages_of_a_running_run_say_where_they_are() -> None:
    run = seen(CALIBRATING, 64)
    assert run.state == "running"
    assert states(run) == {
        "fetch": "up to date",
        "calibrate": "running",
        "postprocess": "waiting",
        "verify": "waiting",
    }
    calibrate = run.stages[1]
    assert (calibrate.done, calibrate.total, calibrate.unit, calibrate.rate) == (12, 43, "layers", 0.25)
    assert calibrate.elapsed_s == pytest.approx(62)
    assert (calibrate.peak.host, calibrate.peak.gpu) == (5, 7)


def test_the_eta_is_the_running_stages_own_and_the_estimates_of_those_to_come() -> None:
    run = seen(CALIBRATING, 64)
    assert run.stages[1].eta_s == pytest.approx(120)  # four seconds after it was said
    assert run.eta_s == pytest.approx(120 + 30 + 300)
    assert not run.unknown


def test_before_its_first_step_a_stage_has_its_estimate() -> None:
    assert seen(CALIBRATING[:4], 52).eta_s == pytest.approx(200 - 50 + 30 + 300)


def test_a_stage_without_an_estimate_is_named_and_not_counted_as_nothing() -> None:
    history = [begun(fetch=0.0, calibrate=200.0, postprocess=30.0), *CALIBRATING[1:]]
    run = seen(history, 64)
    assert run.unknown == ("verify",)
    assert run.eta_s == pytest.approx(150)


def test_of_a_download_and_the_stage_beside_it_the_longer_one_counts() -> None:
    history = [
        begun(fetch=1000.0, calibrate=200.0, postprocess=30.0, verify=300.0),
        at(0, "fetch", "start", 101),
        progress(10, "fetch", 10, 1000, unit="MiB", rate=1.0, eta_s=990.0),
    ]
    assert seen(history, 10).eta_s == pytest.approx(990 + 30 + 300)
    history += [at(11, "calibrate", "start"), progress(12, "calibrate", 1, 43, rate=0.01, eta_s=4200.0)]
    assert seen(history, 12).eta_s == pytest.approx(4200 + 30 + 300)


def test_a_program_has_ended_only_when_its_runner_says_so() -> None:
    history = [*CALIBRATING, at(180, "calibrate", "end", PROGRAM, done=43, total=43, elapsed_s=168.0)]
    assert states(seen(history, 181))["calibrate"] == "running"
    history.append(at(190, "calibrate", "end", elapsed_s=188.0))
    run = seen(history, 191)
    assert states(run)["calibrate"] == "done"
    assert run.stages[1].elapsed_s == 188.0
    assert run.eta_s == pytest.approx(330)


def test_a_run_that_has_ended_well_passed_over_what_nothing_was_heard_of() -> None:
    history = [
        *CALIBRATING[2:],
        at(190, "calibrate", "end", elapsed_s=188.0),
        at(191, "postprocess", "up-to-date"),
        at(192, "verify", "up-to-date"),
        at(193, "", "run-end", code=0),
    ]
    run = seen([ESTIMATED, *history], 9999, alive=False)
    assert run.state == "done"
    assert states(run)["fetch"] == "not needed"
    assert (run.elapsed_s, run.eta_s) == (193, 0)


@pytest.mark.parametrize(("code", "state"), [(1, "failed"), (130, "interrupted"), (143, "interrupted")])
def test_a_run_that_ends_early_says_how(code: int, state: str) -> None:
    run = seen([*CALIBRATING, at(70, "", "run-end", code=code)], 99, alive=False)
    assert run.state == state
    assert states(run) == {"fetch": "up to date", "calibrate": state, "postprocess": "waiting", "verify": "waiting"}


def test_what_a_program_failed_with_is_kept() -> None:
    history = [
        *CALIBRATING,
        at(61, "calibrate", "failed", PROGRAM, done=12, total=43, fact="the disk is full"),
        at(62, "calibrate", "failed", elapsed_s=60.0, code=1),
        at(63, "", "run-end", code=1),
    ]
    run = seen(history, 99, alive=False)
    assert run.stages[1].fact == "the disk is full"
    assert states(run)["calibrate"] == "failed"


def test_a_run_whose_process_is_gone_has_died() -> None:
    run = seen(CALIBRATING, 5000, alive=False)
    assert run.state == "died"
    assert states(run)["calibrate"] == "interrupted"
    assert run.elapsed_s == 60  # since when nothing was heard is not known


def test_the_last_run_counts_and_not_what_came_before() -> None:
    history = [*CALIBRATING, at(70, "", "run-end", code=1), begun(seconds=100, pid=300)]
    run = seen(history, 101)
    assert run.pid == 300
    assert set(states(run).values()) == {"waiting"}


def test_a_download_beside_a_run_is_a_part_of_it() -> None:
    alone = [begun(["fetch"], 70, 400), at(71, "fetch", "up-to-date", 400), at(72, "", "run-end", 400, code=0)]
    assert seen([*CALIBRATING, *alone], 73).pid == RUNNER
    assert seen([*CALIBRATING, *alone, at(80, "", "run-end", code=0)], 81, alive=False).pid == RUNNER
    assert seen([*CALIBRATING, at(65, "", "run-end", code=1), *alone], 73, alive=False).pid == 400
    assert seen([*CALIBRATING, *alone], 73, alive=False).pid == 400  # the other died before, or after, unheard


def test_a_pid_that_is_used_again_ends_only_its_own_run() -> None:
    history = [*CALIBRATING, begun(seconds=100), at(110, "", "run-end", code=0), begun(["fetch"], 120, 500)]
    assert seen(history, 121).pid == 500


def test_without_a_run_there_is_nothing_to_see() -> None:
    assert run_state.view([at(0, "calibrate", "start")], BEGUN_AT, lambda _stages: True) is None


def test_a_run_lives_while_its_lock_is_held(tmp_path: Path) -> None:
    lock = tmp_path / ".stamps" / "lock"
    assert not run_state.lives(tmp_path, STAGES)
    lock.parent.mkdir()
    with open(lock, "w") as held:
        assert not run_state.lives(tmp_path, STAGES)
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_state.lives(tmp_path, STAGES)
        assert not run_state.lives(tmp_path, ["fetch"])
    assert not run_state.lives(tmp_path, STAGES)


def written(tmp_path: Path, history: list[dict[str, Any]]) -> Path:
    work = tmp_path / "flash"
    path = events.file_of(work)
    path.parent.mkdir(parents=True)
    shift = time.time() - BEGUN_AT - 64
    for event in history:
        moment = datetime.fromtimestamp(events.seconds(event) + shift, timezone.utc)
        event = event | {"time": moment.isoformat(timespec="milliseconds")}
        with open(path, "a") as file:
            file.write(json.dumps(event) + "\n")
    return work


def hold(work: Path) -> int:
    (work / ".stamps").mkdir()
    descriptor = os.open(work / ".stamps" / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_status_shows_stages_and_when_all_will_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = written(tmp_path, CALIBRATING)
    held = hold(work)
    try:
        assert run_here("status", "--work", work) == 0
        out = capsys.readouterr().out
        assert run_here("status", "--work", work, "--json") == 0
        found = json.loads(capsys.readouterr().out)
    finally:
        os.close(held)
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "running 12/43 layers" in rows["calibrate"] and "4.0 s a layer" in rows["calibrate"]
    assert "waiting" in rows["verify"] and "~ 5 min 00 s" in rows["verify"]
    assert re.search(r"^artifact: 1 min \d\d s so far, [67] min \d\d s left, done at ", out, re.MULTILINE)
    assert found["state"] == "running"
    assert found["finish_at"] == pytest.approx(time.time() + 450, abs=20)
    assert [each["stage"] for each in found["stages"]] == STAGES


def test_status_of_a_run_that_was_killed_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("status", "--work", written(tmp_path, CALIBRATING)) == 0
    out = capsys.readouterr().out
    assert "interrupted 12/43 layers" in out
    assert "artifact: its process 100 is gone without a word, 1 min 00 s after its start" in out
    assert out.splitlines()[-1] == "what is finished is kept; it goes on with: make artifact PROFILE=flash"


def test_status_without_a_run_says_what_to_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("status", "--work", tmp_path / "flash") == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: nothing has run in {tmp_path / 'flash'} yet"
    assert hint == "hint: make artifact PROFILE=flash"


def test_watch_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = written(tmp_path, [*CALIBRATING, at(62, "", "run-end", code=1)])
    assert run_here("status", "--work", work, "--watch") == 0
    assert "artifact: failed after 1 min 02 s in calibrate" in capsys.readouterr().out
