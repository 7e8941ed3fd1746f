"""scripts.image and scripts.reproduce where something is missing: a fact and a command, never a traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def program(*arguments: str, daemon: str = "unix:///nowhere") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    environment = {"PATH": "/usr/bin:/bin", "DOCKER_HOST": daemon}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [
        ("scripts.image", "build", "calib", "serve"),
        ("scripts.image", "push", "calib", "--to", "registry.example.org/v4forge"),
        ("scripts.image", "pull", "serve"),
        ("scripts.image", "shell", "calib"),
        ("scripts.reproduce", "calib"),
    ],
)
def test_without_a_daemon(command: tuple[str, ...]) -> None:
    done = program(*command)
    assert done.returncode == 1
    fact, hint = done.stderr.splitlines()
    assert fact == "error: no docker daemon answers at unix:///nowhere"
    assert re.fullmatch(r"hint: .*sudo (systemctl start docker|service docker start)", hint)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("scripts.image", "build", "train"), 2, "there is no image 'train'"),
        (("scripts.image", "build", "calib", "--set", "LANE"), 2, "'LANE' is not ARG=VALUE"),
        (("scripts.image", "push", "calib", "--to", ""), 1, "hint: make push REGISTRY=<host>/<path>"),
    ],
)
def test_what_was_asked_for_wrongly_is_named(command: tuple[str, ...], code: int, said: str) -> None:
    done = program(*command)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["build", "push", "pull", "shell"])
def test_every_command_explains_itself(command: str) -> None:
    done = program("scripts.image", command, "--help")
    assert done.returncode == 0
    assert "calib|serve" in done.stdout
