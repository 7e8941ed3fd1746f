"""Programs of a model in a real container: what they may do, what they may not, and that nothing of them is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from v4forge.bench import lm_eval, sandbox
from v4forge.bench.lm_eval import Environment, Limits
from v4forge.bench.sandbox import Verdict
from v4forge.errors import UserError
from v4forge.images.containers import Engine

pytestmark = pytest.mark.images
LIMIT_S = 8.0
DEAF = """
import signal, time
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while True: time.sleep(1)
"""
RUNS_A_FILE = """
import os
open("/tmp/run", "w").write("#!/bin/sh\\n")
os.chmod("/tmp/run", 0o755)
os.execv("/tmp/run", ["run"])
"""


@pytest.fixture(autouse=True)
def nothing_left(engine: Engine) -> Iterator[None]:
    yield
    assert engine.client.containers.list(all=True, filters={"label": sandbox.LABEL}) == []


def judge(engine: Engine, image: str, *programs: str, limit_s: float = LIMIT_S) -> list[Verdict]:
    return sandbox.score(engine, image, programs, limit_s=limit_s)


def test_right_programs_pass_and_wrong_ones_fail_in_their_order(engine: Engine, image: str) -> None:
    programs = ["def f(): return 1\nassert f() == 1", "assert 1 == 2, 'not so'", "def f(:", "import re"]
    right, wrong, torn, library = judge(engine, image, *programs)
    assert (right.outcome, library.outcome) == ("passed", "passed")
    assert wrong.outcome == "failed" and "not so" in wrong.detail
    assert torn.outcome == "failed" and "SyntaxError" in torn.detail


def test_a_program_that_ends_before_its_tests_has_not_passed(engine: Engine, image: str) -> None:
    for verdict in judge(engine, image, "import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()"):
        assert verdict.outcome == "failed" and "ended early" in verdict.detail


def test_a_program_that_says_something_at_its_end_has_passed(engine: Engine, image: str) -> None:
    (verdict,) = judge(engine, image, "import atexit\natexit.register(print, 'bye')")
    assert verdict.passed


ENDLESS = (
    "while True: pass",
    "while True: print('y' * 1000)",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    DEAF,
)


def test_a_program_without_an_end_is_ended(engine: Engine, image: str) -> None:
    begun = time.monotonic()
    assert [verdict.outcome for verdict in judge(engine, image, *ENDLESS, limit_s=2)] == ["timeout"] * len(ENDLESS)
    assert time.monotonic() - begun < 60


def test_a_fork_bomb_gets_no_more_than_its_processes(engine: Engine, image: str) -> None:
    program = (
        "import os, time\nmade = 0\ntry:\n    while made < 1000:\n        if os.fork() == 0: time.sleep(60)\n"
        "        made += 1\nexcept OSError: pass\nassert made < 64, made"
    )
    (verdict,) = judge(engine, image, program)
    assert verdict.passed, verdict


def test_a_program_that_eats_memory_is_ended(engine: Engine, image: str) -> None:
    (verdict,) = judge(engine, image, "eaten = []\nwhile True: eaten.append(bytearray(1 << 20))")
    assert verdict.outcome == "memory"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import socket\nsocket.create_connection(('192.0.2.1', 80), 2)", "Network is unreachable"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 22), 2)", "refused"),
        ("import socket\nsocket.getaddrinfo('example.org', 80)", "gaierror"),
        ("open('/etc/passwd', 'a')", "Permission denied"),
        ("open('/here', 'w')", "Read-only file system"),
        ("open('/usr/lib/here', 'w')", "Read-only file system"),
        ("open('/proc/sysrq-trigger', 'w')", "Error"),
        ("open('/tmp/large', 'wb').write(bytes(64 << 20))", "OSError"),
        ("for n in range(8): open(f'/tmp/{n}', 'wb').write(bytes(8 << 20))", "No space left"),
        ("import os\nos.setuid(0)", "Operation not permitted"),
        ("import os\nos.mkdir('/tmp/root'); os.chroot('/tmp/root')", "Operation not permitted"),
        (RUNS_A_FILE, "ermission"),
        ("import os\nassert os.path.exists('/var/run/docker.sock')", "AssertionError"),
    ],
)
def test_a_program_reaches_nothing_outside(program: str, reason: str, engine: Engine, image: str) -> None:
    (verdict,) = judge(engine, image, program)
    assert verdict.outcome == "failed"
    assert reason in verdict.detail


def test_a_program_may_write_a_little_below_tmp(engine: Engine, image: str) -> None:
    (verdict,) = judge(engine, image, "open('/tmp/x', 'w').write('x')\nassert open('/tmp/x').read() == 'x'")
    assert verdict.passed


def test_what_one_program_writes_no_other_sees(engine: Engine, image: str) -> None:
    program = "import os\nassert os.listdir('/tmp') == [], os.listdir('/tmp')\nopen('/tmp/x', 'w').write('x')"
    assert all(verdict.passed for verdict in judge(engine, image, *[program] * 6))


def test_the_environment_of_the_caller_is_not_seen(engine: Engine, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "sesame")
    (verdict,) = judge(engine, image, "import os\nassert 'sesame' not in str(os.environ)")
    assert verdict.passed


@pytest.mark.parametrize("program", ["x = '" + "x" * 200_000 + "'", "x = '\0'"])
def test_a_program_that_cannot_be_handed_over_fails(program: str, engine: Engine, image: str) -> None:
    assert judge(engine, image, program)[0].outcome == "failed"


def test_what_a_killed_run_left_is_removed_by_the_next(engine: Engine, image: str) -> None:
    options = sandbox.options(image, "import time; time.sleep(600)", "mark")
    options["labels"] = {sandbox.LABEL: sandbox.owner(2**22 + 1)}  # above the greatest process id
    engine.client.containers.create(**options).start()
    assert judge(engine, image, "pass")[0].passed


def test_what_a_run_on_another_host_uses_is_left_alone(engine: Engine, image: str) -> None:
    options = sandbox.options(image, "pass", "mark")
    options["labels"] = {sandbox.LABEL: f"{2**22 + 1}@elsewhere"}
    other = engine.client.containers.create(**options)
    try:
        assert judge(engine, image, "pass")[0].passed
        other.reload()
    finally:
        other.remove(force=True)


def test_an_image_that_is_not_here_is_told(engine: Engine) -> None:
    with pytest.raises(UserError, match="run in containers only, and the image no-such-image is not here"):
        sandbox.connect("no-such-image")


# lm-eval's way into a container: any program in its place.


def environment(engine: Engine, image: str, work: Path) -> Environment:
    return Environment(work, engine=engine, image=image)


def test_a_program_in_the_image_writes_to_its_folder_and_its_output_to_the_log(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    code = (
        f"open('{tmp_path}/made', 'w').write('x'); print('Requesting API: 2/2'); import os; print(os.environ['NAMED'])"
    )
    words = ["python3", "-c", code]
    said = lm_eval.run(environment(engine, image, tmp_path), words, {"NAMED": "so"}, tmp_path / "log", Limits(30, 30))
    assert said.splitlines() == ["Requesting API: 2/2", "so"]
    assert (tmp_path / "made").read_text() == "x"


def test_a_stall_in_the_image_ends_in_time_and_leaves_no_container(
    engine: Engine, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval, "GRACE_S", 1.0)
    words = ["python3", "-u", "-c", "import time; print('Requesting API: 1/2'); time.sleep(600)"]
    with pytest.raises(UserError, match="after 1 of 2"):
        lm_eval.run(environment(engine, image, tmp_path), words, {}, tmp_path / "log", Limits(2, 60))
    label = f"{lm_eval.RUN_LABEL}={tmp_path}"
    assert engine.client.containers.list(all=True, filters={"label": label}) == []


def test_a_failure_in_the_image_is_told_with_its_last_words(engine: Engine, image: str, tmp_path: Path) -> None:
    words = ["python3", "-c", "raise SystemExit('no module lm_eval')"]
    with pytest.raises(UserError, match="lm-eval ended with 1: 'no module lm_eval'"):
        lm_eval.run(environment(engine, image, tmp_path), words, {}, tmp_path / "log", Limits(30, 30))
