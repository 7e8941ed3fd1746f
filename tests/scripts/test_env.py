"""Environments from the locks: where `make env` builds, never over what a link leads to; how pip is asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.env import Environment, clear
from v4forge.checkout import ROOT
from v4forge.errors import UserError


def test_behind_a_link_somebody_s_environment_stays(tmp_path: Path) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / ".venv"
    (theirs / "bin").mkdir(parents=True)
    link.symlink_to(theirs)
    with pytest.raises(UserError) as found:
        clear(link)
    assert found.value.fact.startswith(f"{link} is a link to {theirs}") and f"rm {link} && make env" in found.value.hint
    assert (theirs / "bin").is_dir()


def test_an_environment_may_be_built_behind_a_link(tmp_path: Path) -> None:
    link = tmp_path / ".venv"
    link.symlink_to(tmp_path / "another disk")
    for _ in range(2):  # dangling, then empty
        clear(link)
        assert link.is_symlink() and (tmp_path / "another disk").is_dir()


def test_an_environment_of_its_own_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    clear(tmp_path / ".venv")
    assert not (tmp_path / ".venv").exists()
    clear(tmp_path / ".venv")


@pytest.mark.parametrize(
    ("name", "may_not_write", "asked"),
    [
        ("host", False, ["--no-compile"]),
        ("host", True, []),
        ("serve-cpu", False, ["--no-compile"]),
        ("calib", True, ["--no-compile"]),
    ],
)
def test_pip_writes_bytecode_only_where_programs_may_not_and_would_read_it(
    name: str, may_not_write: bool, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", may_not_write)
    assert Environment(name, tmp_path).bytecode == asked


WAITS = "import time; print('waits', flush=True); time.sleep(60)"


@pytest.mark.parametrize(
    "program",
    [
        f"import scripts; {WAITS}",  # as while its other modules load
        f"import sys; from scripts.env import quiet; quiet([sys.executable, '-c', {WAITS!r}])",
    ],
    ids=["imports", "a command of make env"],
)
def test_ctrl_c_is_one_line(program: str) -> None:
    command = [sys.executable, "-c", program]
    running = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert running.stdout and running.stdout.readline() == "waits\n"
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=30)  # whose pipes what it started has as well
    assert (running.returncode, said) == (-signal.SIGINT, "\nstopped\n")
