"""Each checker of make lint passes a good file and fails on a bad one, saying what is wrong."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from dev import lint
from v4forge import checkout
from v4forge.outcomes import FAILED, OK

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
(CONTRACT,) = tomllib.loads(PROJECT)["tool"]["importlinter"]["contracts"]
# What the contract names: a package of each name, which is a module too.
MODULES = [
    f"{module.replace('.', '/')}/__init__.py"
    for line in CONTRACT["layers"]
    for module in line.replace(" ", "").split("|")
]
WORKFLOW = """on: push
jobs:
  test:
    runs-on: ubuntu-24.04
    timeout-minutes: 9
    steps:
      - run: make test
"""
GOOD = {
    "pyproject.toml": PROJECT,
    "v4forge/good.py": '"""Good."""\n\nx: int = 1\n',
    **dict.fromkeys(MODULES, ""),
    ".hadolint.yaml": (ROOT / ".hadolint.yaml").read_text(encoding="utf-8"),
    "Dockerfile.good": 'ARG BASE\nFROM ${BASE} AS a\nSHELL ["/bin/sh", "-eu", "-c"]\nRUN cd /x; echo "$HOME"\n',
    "run": '#!/usr/bin/env bash\ncd "$1" || exit\n',
    "compose.yaml": "services:\n  a:\n    image: ${IMAGE}\n",
    ".github/workflows/good.yml": WORKFLOW,
}
# checker, a bad file, and what it says of it
BAD = (
    ("ruff check", "v4forge/bad.py", "import os\n", "F401"),
    ("ruff format", "v4forge/bad.py", "x = ( 1 )\n", "bad.py"),
    ("mypy", "v4forge/bad.py", 'x: int = "1"\n', "Incompatible types in assignment"),
    ("import-linter", "v4forge/checkpoint/bad.py", "import v4forge.model\n", "v4forge.checkpoint.bad -> v4forge.model"),
    ("hadolint", "Dockerfile.bad", "FROM debian:latest\n", "DL3007"),
    ("hadolint", "docker/x/Dockerfile", "ARG B\nFROM ${B} AS b\nRUN echo $HOME\n", "SC2086"),
    ("shellcheck", "docker/bad", "#!/bin/sh\nrm $1\n", "SC2086"),
    ("shellcheck", "bad.sh", "# shellcheck shell=sh\n[[ a ]]\n", "SC3010"),
    ("yaml", "docker/prometheus.yml", "a: [\n", "prometheus.yml"),
    ("yaml", "twice.yaml", "a: 1\na: 2\n", "twice.yaml"),
    ("compose", "compose.test.yaml", "services:\n  a:\n    imag: x\n", "imag"),
    ("workflow", ".github/workflows/bad.yml", WORKFLOW.replace("runs-on", "run-on"), "run-on"),
    ("workflow timeout", ".github/workflows/bad.yml", WORKFLOW.replace("timeout-minutes: 9", "name: x"), "timeout"),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of good files with mypy's cache, so that a run takes no second longer for it."""
    root = tmp_path_factory.mktemp("repository")
    for name, text in GOOD.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / ".gitignore").write_text(".*_cache/\n")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return root


def test_good_files_pass_every_checker(repository: Path) -> None:
    results = list(lint.lint(repository))
    assert [result.outcome for result in results if not result.outcome.ok] == []
    assert [result.outcome.name for result in results if not result.files] == []


@pytest.mark.parametrize(("checker", "name", "text", "says"), BAD, ids=[f"{row[0]}, {row[1]}" for row in BAD])
def test_a_bad_file_fails_its_checker(repository: Path, checker: str, name: str, text: str, says: str) -> None:
    bad = repository / name
    bad.parent.mkdir(parents=True, exist_ok=True)
    bad.write_text(text, encoding="utf-8")
    try:
        (row,) = (row for row in lint.CHECKERS if row.name == checker)
        result = lint.run(row, repository, checkout.names(repository))
    finally:
        bad.unlink()
    assert result.outcome.status == FAILED
    assert says in result.outcome.fact
    module = ".".join(Path(name).with_suffix("").parts)
    assert bad.name in result.outcome.fact or module in result.outcome.fact


def test_every_checker_is_shown_to_fail() -> None:
    assert {row[0] for row in BAD} == {checker.name for checker in lint.CHECKERS}


def test_a_checker_without_files_passes(tmp_path: Path) -> None:
    assert [lint.run(checker, tmp_path, []).outcome.status for checker in lint.CHECKERS] == [OK] * len(lint.CHECKERS)


def test_a_dockerfile_stops_at_the_first_command_that_fails() -> None:
    dockerfiles = list(ROOT.glob("Dockerfile.*"))
    assert dockerfiles
    for dockerfile in dockerfiles:
        before, run, _ = dockerfile.read_text(encoding="utf-8").partition("\nRUN ")
        assert run
        assert re.search(r'^SHELL \["/bin/(ba)?sh", "-[a-z]*e', before, flags=re.MULTILINE), dockerfile.name
