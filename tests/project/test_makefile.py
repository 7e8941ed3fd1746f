"""The Makefile as a user meets it: help, the commands behind targets, errors."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from v4forge import makefile
from v4forge.certified import LEVELS
from v4forge.checkpoint.recipe import RECIPES
from v4forge.images.definitions import IMAGES
from v4forge.model.corpus_rows import BAD_TEXT
from v4forge.pipeline import stages

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^\.PHONY: (\S+)$", MAKEFILE, flags=re.MULTILINE)
MADE = makefile.read()
GROUPS = ("Pipeline", "Serve", "Bench", "Images", "Develop")


def make(*arguments: str, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """As a user calls it, not another make."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=at, capture_output=True, text=True, env=environment)


def test_help_is_the_default_and_fits_a_terminal_with_the_prompt_below() -> None:
    lines = make().stdout.splitlines()
    assert len(lines) < 24 and [line for line in lines if len(line) > 80] == []
    groups = [line[:12].strip() for line in lines[1:-3] if line[0] != " "]
    assert groups == ["Start here", *GROUPS]
    assert {line[12:].split()[0] for line in lines[1:-3]} <= set(TARGETS)
    assert re.findall(r"help-([a-z]+)", lines[-1]) == [group.lower() for group in GROUPS]


def test_the_groups_list_every_target_and_its_variables() -> None:
    listed = []
    for group in GROUPS:
        lines = make(f"help-{group.lower()}").stdout.splitlines()
        assert [line for line in lines if len(line) > 80] == []
        targets, variables = "\n".join(lines).split("\n\n")
        listed += re.findall(r"^([a-z-]+)", targets, flags=re.MULTILINE)
        told = set(re.findall(r"^([A-Z_]+)=", variables, flags=re.MULTILINE))
        own = set().union(*(MADE.own(target.name) for target in MADE.targets.values() if target.group == group))
        assert told == own | MADE.everywhere
    assert listed == TARGETS[1:]


@pytest.mark.parametrize(
    ("words", "fact", "hint"),
    [
        ("demo GPU=8", "no target reads GPU", "GPUS=8"),
        ("artifact profile=flash", "no target reads profile", "PROFILE=flash"),
        ("plan PROFIL=tiny", "no target reads PROFIL", "PROFILE=tiny"),
        ("demo PROFIL=tiny", "no target reads PROFIL", "PROFILE=tiny, which is read by doctor, plan, artifact, serve"),
        ("demo PROFILE=flash", "make demo does not read PROFILE", "make demo without it; it is read by doctor, plan"),
        ("PROFILE=flash", "make help does not read PROFILE", "make help without it"),
        ("artifact card MANIFEST=x", "make artifact card does not read MANIFEST", "make artifact card without it"),
        ("env PIP_INDEX_URL=x", "no target reads PIP_INDEX_URL", "make help-develop has the variables"),
        ("plan GPUS=abc", "GPUS=abc is no number", "GPUS=8"),
        ("serve PORT=http", "PORT=http is no number", "PORT=8000"),
        ("bench-speed DRAFTS=0,1", "DRAFTS=0,1 is no number", "DRAFTS=2"),
        ("plan PROFILE=fash", "PROFILE=fash is none of tiny, flash", "PROFILE=flash"),
        ("publish CONFIRM=0", "CONFIRM=0 is not 1", "CONFIRM=1, or without it"),
        ("dmeo", "there is no target dmeo", "make demo"),
    ],
)
def test_what_make_does_not_understand_is_told_with_what_it_does(words: str, fact: str, hint: str) -> None:
    goals = [word for word in words.split() if "=" not in word] or ["help"]
    told = makefile.fault(MADE, goals, makefile.parsed(word for word in words.split() if "=" in word))
    assert told and told[0] == fact and told[1].startswith(hint)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("demo GPU=8", "error: no target reads GPU\nhint: GPUS=8\n"),
        ("-n plan GPUS=abc", "error: GPUS=abc is no number\nhint: GPUS=8\n"),
        ("PROFILE=flash", "error: make help does not read PROFILE\nhint: make help without it; "),
        ("dmeo", "error: there is no target dmeo\nhint: make demo\n"),
    ],
)
def test_it_ends_make_before_anything_runs(words: str, said: str) -> None:
    done = make(*words.split())
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 3)
    assert done.stderr.startswith(said)


def test_a_folder_is_no_target_that_is_up_to_date() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"docs"}
    for name in sorted(folders):
        done = make(name)
        near = makefile.nearest(name, MADE.targets)
        said = f"error: there is no target {name}\nhint: make {near or 'help'}\n"
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(said), done.stderr
    assert makefile.nearest("tests", MADE.targets) == "test"


def test_it_is_said_before_there_is_an_environment(tmp_path: Path) -> None:
    for name in ("Makefile", "scripts", "v4forge"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert make("demo", "GPU=8", at=tmp_path).stderr.startswith("error: no target reads GPU\nhint: GPUS=8\n")
    assert make("help-serve", at=tmp_path).stdout.startswith("serve ")


@pytest.mark.parametrize(
    "words",
    [
        "artifact card PROFILE=flash",  # of several goals one has to read it
        "verify card SIGN_KEY=a",
        "status -j4 SHELL=bash V=1 MAKEFLAGS=k",
        "bench DATASETS=a LIMIT=2 WITH=--x URL=x",  # of what it calls
        "lint PYTHON=python3 DEVICES=0",  # of what it needs, and of every target
        "bench-speed DRAFTS=0\\ 1 SET=a=1\\ b=2",
        "serve DRAFTS= SCRATCH=a\\ \\ b ALLOW='cut tool-call'",
        "reproduce DRY_RUN=1",
    ],
)
def test_what_a_target_reads_is_understood(words: str) -> None:
    done = make("-n", *shlex.split(words))
    assert (done.returncode, done.stderr) == (0, "")


def test_make_called_by_make_is_not_asked_for_what_its_caller_was_given(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(f"outer:\n\t@$(MAKE) -n -C {ROOT} serve-stop\n")
    done = subprocess.run(["make", "outer", "LIMIT=2"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_variable_that_may_be_set_is_documented_and_read() -> None:
    written = set(re.findall(r"^([A-Z][A-Z_]*) :=", MAKEFILE, flags=re.MULTILINE))
    assert written - {"SHELL"} | {"PYTHON"} == set(MADE.variables)
    assert set().union(*map(MADE.reads, TARGETS)) == set(MADE.variables)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("PROFILE", stages.PROFILES),
        ("RECIPE", RECIPES),
        ("BAD_TEXT", BAD_TEXT),
        ("CHECK", LEVELS),
        ("IMAGE", IMAGES),
    ],
)
def test_choices_are_those_of_the_programs(name: str, values: Iterable[str]) -> None:
    assert sorted(MADE.variables[name].form.split("|")) == sorted(values)


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


def test_a_shim_of_python_is_asked_once_what_it_leads_to(tmp_path: Path) -> None:
    for name in ("Makefile", "scripts", "v4forge"):
        (tmp_path / name).symlink_to(ROOT / name)
    shim = tmp_path / "shims/python3.12"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\necho called >>{tmp_path}/log\nexec {sys.executable} "$@"\n')
    shim.chmod(0o755)
    environment = {"PATH": f"{shim.parent}:/usr/bin:/bin"}
    done = subprocess.run(["make", "help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "log").read_text() == "called\n"


@pytest.mark.parametrize("target", ["env", "lock"])
def test_a_machine_without_a_usable_python_gets_a_hint(target: str) -> None:
    done = make(target, "PYTHON=")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith("error: no Python 3.11 or 3.12")
    assert done.stderr.splitlines()[1].startswith("hint: apt-get install")


def test_an_environment_that_is_there_is_looked_at_by_the_python_that_it_is_of(tmp_path: Path) -> None:
    """PATH may have another first, for which all would be built anew, or a shim, which takes longer than the look."""
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "own").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/log\necho "$0"\n')
    (tmp_path / "own").chmod(0o755)
    (tmp_path / ".venv/bin/python").symlink_to(tmp_path / "own")
    assert make("env", at=tmp_path).returncode == 0
    assert (tmp_path / "log").read_text().splitlines()[-1].split() == ["-m", "scripts.env"]


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


def test_a_plan_for_another_machine_has_its_gpus_and_the_full_model_unless_told() -> None:
    words = shlex.split(shown("plan", "ON=8xH200"))
    assert words[words.index("--profile") + 1] == "flash" and "--gpus" not in words
    words = shlex.split(shown("plan", "ON=8xH200", "PROFILE=tiny", "GPUS=4"))
    assert words[words.index("--profile") + 1] == "tiny" and words[words.index("--gpus") + 1] == "4"


# Every character that a shell or make reads otherwise.
@pytest.mark.parametrize("path", ["/a  b's,c;d&e|f", '/%s\\n"q"$HOME', "/a$(b#1", "/ä`x`"])
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
