"""pipeline.progress and scripts.cli.steps: rate, ETA and what a person sees of them, on a terminal and in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from scripts import cli
from v4forge.errors import UserError
from v4forge.pipeline import events, progress
from v4forge.pipeline.progress import Moment, Pace, Peak

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def followed(total: int, steps: list[tuple[float, int]], unit: str = "layers") -> tuple[Pace, Clock]:
    """A stage that says at each of these moments, in seconds since its start, how many steps are done."""
    clock = Clock()
    found = Pace("calibrate", total, unit, clock)
    for at, done in steps:
        clock.now = 1000.0 + at
        found.advance(done, "forward")
    return found, clock


def test_rate_and_eta_of_even_steps_are_exact() -> None:
    found, _ = followed(43, [(4.0 * n, n) for n in range(11)])
    assert found.moment().rate == pytest.approx(0.25)
    assert found.moment().eta_s == pytest.approx(33 * 4)


def test_what_was_finished_at_the_start_does_not_count() -> None:
    found, _ = followed(43, [(2.0, 12), (6.0, 13), (10.0, 14)])
    moment = found.moment()
    assert (moment.done, moment.begun) == (14, 12)
    assert moment.rate == pytest.approx(0.25)
    assert moment.eta_s == pytest.approx(29 * 4)


def test_steps_that_were_only_looked_at_do_not_count() -> None:
    skipped = [(0.01 * n, n) for n in range(13)]
    found, _ = followed(43, [*skipped, (4.12, 13), (8.12, 14)])
    assert found.moment().rate == pytest.approx(0.25, rel=0.01)
    assert found.moment().begun == 12


def test_quick_steps_that_stay_quick_all_count() -> None:
    found, _ = followed(100, [(0.1 * n, n) for n in range(51)])
    assert found.moment().begun == 0
    assert found.moment().rate == pytest.approx(10)


def test_a_slow_first_step_does_not_spoil_the_eta() -> None:
    found, _ = followed(43, [(0, 0), (60.0, 1), *((60 + 4.0 * n, 1 + n) for n in range(1, 9))])
    assert found.moment().eta_s == pytest.approx(34 * 4)


def test_the_eta_runs_down_within_a_step_and_grows_where_a_step_takes_longer() -> None:
    found, clock = followed(10, [(0, 0), (10, 1), (20, 2)])
    clock.now += 4
    assert found.moment().eta_s == pytest.approx(8 * 10 - 4)
    clock.now += 196
    late = found.moment()
    assert late.eta_s is not None and late.eta_s > 7 * 50
    assert late.rate is not None and late.rate < 1 / 50


def test_the_last_step_under_way_is_never_over() -> None:
    found, clock = followed(3, [(0, 0), (10, 1), (20, 2)])
    clock.now += 10
    eta_s = found.moment().eta_s
    assert eta_s is not None and 0 < eta_s < 3


def test_nothing_is_claimed_before_a_step_has_been_finished() -> None:
    found, clock = followed(43, [(0.0, 12), (30.0, 12)])
    clock.now += 30
    assert (found.moment().rate, found.moment().eta_s) == (None, None)


def test_a_million_steps_keep_few_points() -> None:
    found, _ = followed(1_000_000, [(n / 1000, n) for n in range(0, 1_000_000, 10)], "MiB")
    assert len(found._points) < 3000
    assert found.moment().rate == pytest.approx(1000, rel=0.01)
    assert found.moment().eta_s == pytest.approx(0.01, abs=0.01)


def test_the_memory_of_a_gpu_is_asked_for_only_where_one_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def most(index: int) -> int:
        asked.append(index)
        return 100 + index

    cuda = SimpleNamespace(is_initialized=lambda: False, device_count=lambda: 2, max_memory_allocated=most)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert progress.peak().gpu == 0 and not asked
    cuda.is_initialized = lambda: True
    assert progress.peak().gpu == 101
    monkeypatch.delitem(sys.modules, "torch")
    assert progress.peak().gpu == 0
    assert progress.peak().host > 10 << 20


@pytest.mark.parametrize("torch", [SimpleNamespace(), SimpleNamespace(cuda=SimpleNamespace())])
def test_the_bar_of_one_thread_goes_on_while_another_imports_torch(
    torch: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert progress.peak().gpu == 0


def test_peak_memory_is_the_programs_own_and_not_its_parents() -> None:
    held = bytearray(300 << 20)
    program = "from v4forge.pipeline import progress; print(progress.peak().host)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 150 << 20 < len(held) < progress.peak().host


def test_peak_memory_stays_when_the_device_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [Peak(1, 60), Peak(2, 5)]
    monkeypatch.setattr(progress, "peak", lambda: peaks.pop(0))
    found, _ = followed(2, [])
    found.moment()
    assert found.moment().peak == Peak(2, 60)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(events.STAGE, raising=False)
    monkeypatch.setenv(events.VARIABLE, str(tmp_path / "events.jsonl"))
    return tmp_path / "events.jsonl"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(cli, "time", found)
    monkeypatch.setattr(cli, "Pace", lambda what, total, unit: Pace(what, total, unit, found))
    monkeypatch.setattr(progress, "peak", lambda: Peak(14 << 30, 60 << 30))
    return found


def work(clock: Clock, first: int = 0, until: int = 43) -> Callable[[Callable[[int, str], None]], None]:
    def run(advance: Callable[[int, str], None]) -> None:
        for done in range(first, until):
            advance(done, "forward")
            clock.now += 4

    return run


def test_a_log_gets_a_line_every_ten_seconds_and_a_last_one(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with cli.steps("calibrate", 43, "layers") as advance:
        work(clock)(advance)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "calibrate: 3/43 layers, forward, 4.0 s a layer, 2 min 40 s left, 14.0 GiB, GPU 60.0 GiB"
    assert len(lines) == 43 // 3 + 1
    assert lines[-1] == "calibrate: 43 layers in 2 min 52 s, 4.0 s a layer, peak 14.0 GiB, GPU 60.0 GiB"


def test_a_short_stage_says_nothing_in_a_log(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with cli.steps("calibrate", 2, "layers") as advance:
        work(clock, until=2)(advance)
    assert capsys.readouterr().err == ""


def test_a_resumed_stage_says_what_it_did_itself(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with cli.steps("calibrate", 43, "layers") as advance:
        work(clock, first=31)(advance)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("calibrate: 12 of 43 layers in 48 s, 4.0 s a layer")


def test_events_tell_start_progress_and_end(clock: Clock, log: Path) -> None:
    with cli.steps("calibrate", 43, "layers") as advance:
        work(clock)(advance)
    found = events.read(log)
    assert [event["event"] for event in found] == ["start", *["progress"] * 42, "end"]
    assert (
        found[3].items()
        >= {
            "done": 3,
            "total": 43,
            "unit": "layers",
            "doing": "forward",
            "rate": 0.25,
            "eta_s": 160.0,
            "elapsed_s": 12.0,
            "peak_host_bytes": 14 << 30,
            "peak_gpu_bytes": 60 << 30,
        }.items()
    )
    assert (found[-1]["done"], found[-1]["elapsed_s"]) == (43, 172.0)


def test_progress_is_told_at_most_once_a_second(clock: Clock, log: Path) -> None:
    with cli.steps("verify", 1000, "MiB") as advance:
        for done in range(1000):
            advance(done, "")
            clock.now += 0.01
    assert sum(event["event"] == "progress" for event in events.read(log)) == 9


def test_ctrl_c_says_where_it_stopped_and_that_it_goes_on(
    clock: Clock, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), cli.steps("calibrate", 43, "layers", resumes=True) as advance:
        advance(12, "experts")
        raise KeyboardInterrupt
    line = capsys.readouterr().err
    assert line == "calibrate: stopped at 12 of 43 layers; the same command goes on from there\n"
    assert [event["event"] for event in events.read(log)] == ["start", "interrupted"]


def test_a_stage_that_begins_again_does_not_claim_otherwise(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), cli.steps("verify", 43, "MiB") as advance:
        advance(12, "")
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "verify: stopped at 12 of 43 MiB\n"


def test_a_failure_is_told_with_its_fact(clock: Clock, log: Path) -> None:
    with pytest.raises(UserError), cli.steps("calibrate", 43, "layers"):
        raise UserError("the disk is full", "free some")
    assert events.read(log)[-1].items() >= {"event": "failed", "fact": "the disk is full"}.items()


def test_many_threads_may_tell(log: Path) -> None:
    with cli.steps("quality", 80, "tasks") as advance:
        threads = [threading.Thread(target=lambda n=n: [advance(n * 10 + i, "") for i in range(10)]) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert events.read(log)[-1].items() >= {"event": "end", "done": 80}.items()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_bar_fits_the_terminal_and_keeps_what_matters(width: int) -> None:
    moment = Moment(
        "postprocess-rtn", "layers", 43, 12, 0, "experts 224-255", 50, 0.2325, 133, Peak(14 << 30, 60 << 30)
    )
    console = Console(width=width, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    with console.capture() as capture:
        console.print(cli.bar(moment, width))
    text = re.sub(r"\x1b\[[0-9;]*m", "", capture.get())
    assert text.count("\n") == 1
    assert "postprocess-rtn" in text and "12/43" in text
    assert ("2 min 13 s left" in text) == (width > 50)
    assert ("GPU 60.0 GiB" in text) == (width > 100)


PROGRAM = """
import sys, time
from scripts.cli import steps
from v4forge.errors import run_main

def main():
    with steps("outer", 3, "layers", resumes=True) as advance:
        for done in range(3):
            advance(done, "forward")
            with steps("inner", 2) as within:
                within(1, "")
            print(f"line {done}", flush=True)
            time.sleep(0.05 if len(sys.argv) < 2 else 20)

run_main(main)
"""


def on_terminal(*arguments: str, until: str = "", send: bytes = b"") -> tuple[str, int]:
    """The program in a terminal of its own -> what it wrote there, its exit code. `send` is typed after `until`."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", PROGRAM, *arguments], os.environ | {"PYTHONPATH": str(ROOT)})
    written = b""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the last process with the terminal has ended
            break
        if not piece:
            break
        written += piece
        if send and until.encode() in written:
            os.write(terminal, send)
            send = b""
    os.close(terminal)
    return written.decode(), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def visible(written: str) -> list[str]:
    """The lines that stay when erased ones are gone."""
    lines = [""]
    for piece in re.split(r"(\r?\n|\r|\x1b\[[0-9;?]*[A-Za-z])", written):
        if piece.endswith("\n"):
            lines.append("")
        elif piece == "\x1b[2K":
            lines[-1] = ""
        elif piece == "\x1b[1A" and len(lines) > 1:
            lines.pop()
        elif not piece.startswith(("\r", "\x1b")):
            lines[-1] += piece
    return [line.rstrip() for line in lines if line.strip()]


def test_a_terminal_has_a_bar_while_it_runs_and_one_line_a_stage_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    written, code = on_terminal()
    assert code == 0
    assert "━" in written and "layers" in written
    left = visible(written)
    assert [line for line in left if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    assert sum(line.startswith("inner: ") for line in left) == 3
    assert re.fullmatch(r"outer: 3 layers in \d+(\.\d)? s, .*, peak \d+ MiB", left[-1]), left
    assert not any("━" in line for line in left)


def test_ctrl_c_on_a_terminal_clears_the_bar_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    written, code = on_terminal("slow", until="line 0", send=b"\x03")
    assert code == 130
    assert visible(written)[-1] == "outer: stopped at 0 of 3 layers; the same command goes on from there"
    assert "Traceback" not in written


def test_all_that_was_done_at_once_is_what_was_done() -> None:
    now = [0.0]
    pace = Pace("publish", 150, "MB", clock=lambda: now[0])
    pace.advance(0, "sending")
    now[0] = 0.9
    pace.advance(150, "sent")
    now[0] = 1.1
    pace.end()
    assert pace.moment().ended().startswith("publish: 150 MB in 1.1 s")
