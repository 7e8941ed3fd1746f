"""What becomes of a replica that hangs: docker/serve/watchdog.py, by docker/serve/replica and a real supervisord."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import free_ports
from watchdog_program import watchdog

from v4forge.serving.deployment import Deployment
from v4forge.serving.supervisord import REPLICA, Supervised

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = ROOT / "tests/support/hanging_stand_in.py"
LOOKS = 3


# --- what a look finds


def metrics(running: int = 0, waiting: int = 0, unanswered: int = 0, engine: int = 0, **steps: int) -> str:
    named = {"num_requests_running": running, "num_requests_waiting": waiting, "generation_tokens_total": 0} | steps
    lines = [f'vllm:{name}{{engine="{engine}",model_name="m"}} {value}.0' for name, value in named.items()]
    return "\n".join(["# HELP x y", *lines, f"v4forge_requests_unanswered {unanswered}.0", ""])


def looks(*answers: str | None) -> list[bool]:
    """Whether each look in turn finds that the server hangs."""
    watch = watchdog.Watch(LOOKS)
    return [bool(watch.see(answer)) for answer in answers]


@pytest.mark.parametrize("busy", [{"running": 1}, {"waiting": 2}, {"unanswered": 1}])
def test_requests_without_a_step_between_so_many_looks_are_a_hang(busy: dict[str, int]) -> None:
    assert looks(metrics(), *[metrics(**busy)] * LOOKS) == [False] * LOOKS + [True]


@pytest.mark.parametrize(
    "step",
    ["generation_tokens_total", "prompt_tokens_total", "request_success_total", "kv_cache_usage_perc"],
)
def test_whatever_moves_is_a_step(step: str) -> None:
    assert not any(looks(*(metrics(running=1, **{step: number // 3}) for number in range(30))))


def test_an_idle_engine_does_not_hang() -> None:
    assert not any(looks(*[metrics()] * 30))


def test_a_look_without_requests_begins_the_count_anew() -> None:
    assert not any(looks(*[metrics(), metrics(running=1), metrics(running=1), metrics()] * 10))


def test_one_engine_of_two_hangs() -> None:
    two = [
        metrics(running=1, engine=0, generation_tokens_total=number) + metrics(running=1, engine=1)
        for number in range(LOOKS + 1)
    ]
    assert looks(*two) == [False] * LOOKS + [True]


def test_a_server_that_has_answered_once_hangs_where_it_is_silent() -> None:
    assert looks(metrics(), *[None] * LOOKS) == [False] * LOOKS + [True]
    assert not any(looks(*[None] * 30))  # it starts
    assert not any(looks(*[metrics(), None, None] * 5))


def test_a_server_without_an_engines_metrics_is_watched_for_silence_only() -> None:
    other = "v4forge_requests_unanswered 1.0\n"
    watch = watchdog.Watch(LOOKS)
    assert not any(watch.see(other) for _ in range(30)) and watch.blind
    assert [bool(watch.see(None)) for _ in range(LOOKS)] == [False] * (LOOKS - 1) + [True]


def test_what_vllm_and_the_middleware_export_is_what_is_read() -> None:
    exported = (ROOT / "tests/data/metrics.txt").read_text(encoding="utf-8")
    assert {name for name in watchdog.STEPS | watchdog.BUSY if f"\n{name}" not in exported} == set()


# --- a replica


@dataclass
class Replica:
    """A replica before a stand-in of vLLM. `said` is what it printed."""

    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def works(self) -> None:
        """Waits until its engine steps."""
        (self.folder / "busy").touch()
        wait_for(lambda: (self.folder / "steps").exists() and (self.folder / "steps").stat().st_size > 0)

    @property
    def engine(self) -> int:
        return int((self.folder / "engine").read_text())


def wait_for(condition: Callable[[], bool], limit_s: float = 30) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.05)


def programs(folder: Path) -> Path:
    """A folder with a vllm that is the stand-in."""
    program = folder / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    program.chmod(0o755)
    return program.parent


def variables(folder: Path, watchdog_s: str) -> dict[str, str]:
    given = {"STARTS": str(folder / "starts"), "API_KEY_FILE": os.devnull, "STAND_IN": str(folder)}
    return os.environ | given | {"WATCHDOG": watchdog_s, "PATH": f"{programs(folder)}:{os.environ['PATH']}"}


@contextmanager
def replica(folder: Path, watchdog_s: str = "0.9", within: Sequence[str] = ()) -> Iterator[Replica]:
    """`within` is a command that runs it."""
    words = [*within, str(REPLICA), "/a", "--port", str(free_ports(1))]
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(
            words, env=variables(folder, watchdog_s), stdout=said, stderr=said, start_new_session=True
        )
    try:
        yield Replica(folder, process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_GRACE", "0.2")


@pytest.mark.parametrize("hang", ["a stopped engine", "a silent server"])
def test_a_server_that_hangs_is_ended_with_its_engine(tmp_path: Path, hang: str) -> None:
    with replica(tmp_path) as made:
        made.works()
        time.sleep(1.5)  # and is left alone as long as it works
        assert made.process.poll() is None and made.said == ""
        begun = time.monotonic()
        if hang == "a stopped engine":
            os.kill(made.engine, signal.SIGSTOP)
        else:
            (tmp_path / "does").write_text("silent")
        assert made.process.wait(30) == -signal.SIGKILL
        assert time.monotonic() - begun >= 0.9
        assert not runs(made.engine)
        (line,) = made.said.splitlines()
        words = "has requests and makes no step" if hang == "a stopped engine" else "does not answer"
        assert line == f"watchdog: the server {words} for 0.9 s; it is ended, to be started again"


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of processes is root's to make")
def test_a_containers_first_process_which_nothing_kills_ends_too(tmp_path: Path) -> None:
    with replica(tmp_path, within=["unshare", "--pid", "--fork"]) as made:
        made.works()
        wait_for((tmp_path / "answered").exists)  # who has never answered is still starting
        (tmp_path / "does").write_text("silent")
        assert made.process.wait(30) == 128 + signal.SIGKILL
        assert "watchdog: the server does not answer" in made.said


def test_without_a_watchdog_a_hang_is_left_alone(tmp_path: Path) -> None:
    with replica(tmp_path, "0") as made:
        made.works()
        os.kill(made.engine, signal.SIGSTOP)
        time.sleep(1.8)
        assert made.process.poll() is None


def test_what_is_paused_as_a_whole_is_not_ended_for_it(tmp_path: Path) -> None:
    with replica(tmp_path) as made:
        made.works()
        os.killpg(made.process.pid, signal.SIGSTOP)
        time.sleep(1.8)
        os.killpg(made.process.pid, signal.SIGCONT)
        time.sleep(1.5)
        assert made.process.poll() is None


def test_a_server_that_says_nothing_of_an_engine_is_told_of_once(tmp_path: Path) -> None:
    with replica(tmp_path) as made:
        (tmp_path / "does").write_text("other")
        wait_for(lambda: made.said != "")
        time.sleep(1)
        assert made.said.splitlines() == [
            "watchdog: /metrics says nothing of an engine; only a server that does not answer is ended"
        ]


def test_the_server_ends_with_its_watchdog(tmp_path: Path) -> None:
    with replica(tmp_path) as made:
        made.works()
        (server,) = map(int, Path(f"/proc/{made.process.pid}/task/{made.process.pid}/children").read_text().split())
        made.process.kill()
        wait_for(lambda: not runs(server), 5)


VLLM = "#!/bin/sh\ntrap 'echo stopped; exit 7' TERM\necho ready\nwhile :; do sleep 0.05; done\n"


def test_a_stop_reaches_the_server_whose_status_is_the_replicas(tmp_path: Path) -> None:
    environment = variables(tmp_path, "60")
    (tmp_path / "bin/vllm").write_text(VLLM)
    with subprocess.Popen([REPLICA, "/a"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.read() == "stopped\n" and process.wait(10) == 7


def test_supervisord_starts_again_what_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(tmp_path, "1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RESTART_S", "1")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: "/bin/cat")  # no router is needed
    folder = tmp_path / "serve"
    kept = Deployment(str(folder), "/a", "host", "cpu", program=str(tmp_path / "bin"), port=free_ports(3), watchdog_s=1)
    folder.mkdir()
    runtime = Supervised(kept)
    runtime.write()
    runtime.start()
    try:
        made = Replica(tmp_path, subprocess.Popen(["true"]))
        made.works()
        time.sleep(0.5)
        hung = made.engine
        os.kill(hung, signal.SIGSTOP)
        wait_for(lambda: (tmp_path / "began").read_text().count("x") == 2, 40)
        assert not runs(hung) and made.engine != hung
        assert "watchdog: the server has requests and makes no step for 1 s" in runtime.log("replica0")
    finally:
        runtime.stop(lambda _: None, ["replica0"])
