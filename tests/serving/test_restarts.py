"""What becomes of a replica that ends: docker/serve/replica, by itself and under a real supervisord."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from v4forge.serving.deployment import Deployment
from v4forge.serving.supervisord import REPLICA, Supervised

ROOT = Path(__file__).resolve().parents[2]
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
# A vllm that notes its starts and ends, but for the ones from the `lasts`-th on.
VLLM = """#!/bin/sh
echo x >>{folder}/began
[ "$(wc -l <{folder}/began)" -lt {lasts} ] || exec sleep 60
exit 1
"""


def vllm(folder: Path, lasts: int) -> Path:
    program = folder / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(VLLM.format(folder=folder, lasts=lasts))
    program.chmod(0o755)
    return program.parent


def variables(folder: Path, programs: Path, **more: str) -> dict[str, str]:
    found = {"PATH": f"{programs}:{os.environ['PATH']}", "STARTS": str(folder / "starts")}
    return os.environ | found | {"RESTART_S": "1"} | more


def start(environment: dict[str, str]) -> tuple[float, str]:
    """Seconds that a start that fails took, and what was said."""
    begun = time.monotonic()
    done = subprocess.run([REPLICA, "/a"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return time.monotonic() - begun, done.stderr


def test_each_start_within_an_hour_waits_twice_as_long_as_the_one_before(tmp_path: Path) -> None:
    environment = variables(tmp_path, vllm(tmp_path, 99))
    found = [start(environment) for _ in range(4)]
    assert all(took_s >= least for (took_s, _), least in zip(found, (0, 1, 2, 4), strict=True))
    assert "started" not in found[0][1]
    assert "started 3 times within an hour; once more in 4 s" in found[3][1]


def test_an_hour_has_only_so_many_starts(tmp_path: Path) -> None:
    environment = variables(tmp_path, vllm(tmp_path, 99), RESTART_LIMIT="2", HOUR_S="8")
    begun = time.monotonic()
    for _ in range(3):
        start(environment)
    assert time.monotonic() - begun >= 7  # the third is in the next hour


def test_what_ran_for_longer_than_an_hour_is_started_again_at_once(tmp_path: Path) -> None:
    (tmp_path / "starts").write_text(f"{int(time.time()) - 3700} {int(time.time()) - 3601}")
    assert "started" not in start(variables(tmp_path, vllm(tmp_path, 99)))[1]


def test_a_replica_that_waits_for_its_start_is_stopped_at_once(tmp_path: Path) -> None:
    environment = variables(tmp_path, vllm(tmp_path, 99), RESTART_S="60")
    start(environment)
    with subprocess.Popen([REPLICA, "/a"], env=environment, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None and "once more in 60 s" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(5) == 0


def test_supervisord_brings_a_replica_back_whose_start_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Callable[[Callable[[], bool]], None]
) -> None:
    programs = vllm(tmp_path, 3)
    monkeypatch.setenv("RESTART_S", "1")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: "/bin/cat")  # no router is needed
    kept = Deployment(str(tmp_path / "serve"), "/a", "host", "cpu", program=str(programs))
    (tmp_path / "serve").mkdir()
    runtime = Supervised(kept)
    runtime.write()
    runtime.start()
    try:
        wait(lambda: (tmp_path / "began").exists() and len((tmp_path / "began").read_text().split()) == 3)
        wait(lambda: runtime.processes()["replica0"].state == "running")
        assert len((tmp_path / "serve/starts-0").read_text().split()) == 3
    finally:
        runtime.stop(lambda _: None, ["replica0"])
    runtime.start()  # by hand: nothing is left of before
    try:
        wait(lambda: len((tmp_path / "began").read_text().split()) == 4)
        assert len((tmp_path / "serve/starts-0").read_text().split()) == 1
    finally:
        runtime.stop(lambda _: None, ["replica0"])


@pytest.fixture
def wait() -> Callable[[Callable[[], bool]], None]:
    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < end, "it did not come to pass in time"
            time.sleep(0.1)

    return wait


def test_a_router_that_is_stopped_right_after_its_start_is_no_first_process() -> None:
    """The kernel keeps a signal from a first process that has no handler for it yet, and the stop then waits for its
    grace, ten minutes."""
    assert SERVICES["router"]["init"] is True


def test_vllm_asks_for_no_key_of_its_own_besides(tmp_path: Path) -> None:
    programs = vllm(tmp_path, 99)
    (programs / "vllm").write_text(f"#!/bin/sh\necho ${{VLLM_API_KEY-none}} >{tmp_path}/key\nexit 1\n")
    start(variables(tmp_path, programs, VLLM_API_KEY="of another server"))
    assert (tmp_path / "key").read_text() == "none\n"
