"""The Makefile as a user meets it: help, the commands behind targets, errors."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from v4forge.pipeline import stages

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^\.PHONY: (\S+)$", MAKEFILE, flags=re.MULTILINE)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def test_help_is_the_default_and_lists_every_target() -> None:
    done = make()
    assert done.returncode == 0
    assert re.findall(r"^  ([a-z-]+) +\S", done.stdout, flags=re.MULTILINE) == TARGETS


def test_the_recipes_of_every_target_expand() -> None:
    done = make("-n", *TARGETS)
    assert done.returncode == 0, done.stderr  # which names the target


def test_every_stage_target_has_a_program_row() -> None:
    assert set(stages.TARGETS) <= stages.STAGES.keys() & set(TARGETS)


def test_every_test_that_serves_is_where_test_serve_looks() -> None:
    looked = re.search(r"not soak\" (tests/.+)", make("-n", "test-serve").stdout)
    assert looked
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.serve" in path.read_text(encoding="utf-8")]
    elsewhere = [path for path in marked if not any(path.is_relative_to(ROOT / at) for at in looked[1].split())]
    assert marked and [path for path in elsewhere if path != Path(__file__)] == []


def test_variables_reach_the_stage_runner() -> None:
    done = make("-n", "calibrate", "PROFILE=flash", "SAMPLES=3", "SEQ_LEN=5", "SEED=7", "CORPUS=a b.txt", "SCRATCH=/x")
    options = ("--profile 'flash'", "--samples '3'", "--seq-len '5'", "--seed '7'", "--corpus 'a b.txt'")
    assert [option for option in options if option not in done.stdout] == []
    assert "--scratch '/x'" in done.stdout


def test_the_demo_is_tiny_whatever_the_profile() -> None:
    assert "--profile tiny" in make("-n", "demo", "PROFILE=flash").stdout


@pytest.mark.parametrize("target", ["env", "lock"])
def test_a_machine_without_a_usable_python_gets_a_hint(target: str) -> None:
    done = make(target, "PYTHON=")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("error: no Python 3.11 or 3.12")
    assert done.stderr.splitlines()[1].startswith("hint: apt-get install")


def test_clean_refuses_an_empty_folder_and_keeps_the_download_and_what_was_measured(tmp_path: Path) -> None:
    assert "SCRATCH is empty" in make("clean", "SCRATCH=").stderr
    for name in ("upstream", "layers", "layers.old-1", "artifact", "reports", ".stamps"):
        (tmp_path / "tiny" / name).mkdir(parents=True)
    for name in (
        ".stamps/fetch.json",
        ".stamps/disk.json",
        ".stamps/calibrate.json",
        "reports/run.json",
        "reports/draft-1.json",
    ):
        (tmp_path / "tiny" / name).write_text("{}")
    assert make("clean", f"SCRATCH={tmp_path}").returncode == 0
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == [".stamps", "reports", "upstream"]
    assert [path.name for path in (tmp_path / "tiny/reports").iterdir()] == ["draft-1.json"]  # hours of measuring
    kept = sorted(path.name for path in (tmp_path / "tiny/.stamps").iterdir())
    assert kept == ["disk.json", "fetch.json"]


def shown(*arguments: str, **variables: str) -> str:
    """The last command that make would run."""
    command = ["make", "-n", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.replace("\\\n", " ").splitlines() if ".venv/bin/python" in line][-1]


@pytest.mark.parametrize(
    "path", ["/a b", "/it's", "/$HOME", "/a$(b", '/"q"', "/a,b", "/#1", "/a;b&c|d", "/ä`x`", "/%s\\n"]
)
def test_any_path_reaches_the_program_as_it_is(path: str) -> None:
    words = shlex.split(shown("calibrate", f"SCRATCH={path}", f"SOURCE={path}"))
    assert words[words.index("--scratch") + 1] == path and words[words.index("--source") + 1] == path
    words = shlex.split(shown("verify", f"FROM={path}", "PROFILE=flash"))
    assert words[words.index("--from") + 1] == path
    words = shlex.split(shown("status", f"SCRATCH={path}"))
    assert words[words.index("--work") + 1] == f"{path}/tiny"
    words = shlex.split(shown("publish", f"ARTIFACT={path}"))
    assert words[words.index("--artifact") + 1] == path


def probe(tmp_path: Path, goals: str) -> Path:
    """The Makefile, whose programs are a stub that writes down when it ran and with which variables of Python."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    stub = tmp_path / ".venv/bin/python"
    stub.write_text(
        '#!/bin/bash\necho "begin $4" >>log; env | grep ^PYTHON >>environment; sleep 0.2; echo "end $4" >>log\n'
    )
    stub.chmod(0o755)
    own = MAKEFILE.replace("@$(PYTHON) -m scripts.env", "@true -m scripts.env")
    (tmp_path / "Makefile").write_text(own)
    variables = {"PYTHONPATH": "/foreign", "PYTHONHOME": "/nowhere", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    command = ["make", "-j8", *goals.split()]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_goals_run_one_after_the_other_whatever_j_says(tmp_path: Path) -> None:
    goals = "calibrate postprocess verify card"
    lines = (probe(tmp_path, goals) / "log").read_text().splitlines()
    assert lines == [f"{moment} {goal}" for goal in goals.split() for moment in ("begin", "end")]


def test_what_a_shell_has_for_its_own_python_is_not_for_ours(tmp_path: Path) -> None:
    found = (probe(tmp_path, "verify") / "environment").read_text().splitlines()
    assert {line.partition("=")[0] for line in found} <= {"PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHON"}
    assert "PYTHONUNBUFFERED=1" in found
