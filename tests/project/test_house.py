"""The house as docs/changing.md tells it: its packages, what they import at once, how long a module is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from v4forge.checkout import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/changing.md").read_text(encoding="utf-8").partition("## The changes")[0]
PACKAGES = sorted(path.parent for path in (ROOT / "v4forge").rglob("*/__init__.py"))
PROGRAMS = [
    path
    for folder in ("scripts", "dev", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
]
# What is run before there is an environment.
BARE = ("errors", "pins", "checkout", *(f"images.{name}" for name in ("locks", "lock_check", "patches", "definitions")))


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_page_the_contract_and_the_folders_name_the_same_packages() -> None:
    there = {path.name for path in PACKAGES if path.parent == ROOT / "v4forge"}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)) == there
    (contract,) = PROJECT["tool"]["importlinter"]["contracts"]
    assert there <= set(re.findall(r"v4forge\.(\w+)", " ".join(contract["layers"])))
    dotted = [path.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGES]
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(
        ["v4forge", *dotted, "v4forge.checkout_files", "v4forge_scripts"]
    )


def test_every_module_of_the_ground_is_in_the_contract() -> None:
    (contract,) = PROJECT["tool"]["importlinter"]["contracts"]
    named = set(re.findall(r"v4forge\.(\w+)", " ".join(contract["layers"])))
    assert {path.stem for path in (ROOT / "v4forge").glob("*.py")} - {"__init__"} <= named


def test_every_room_that_the_page_names_is_there() -> None:
    rooms = [
        name
        for row in re.findall(r"^\| [^|`]+ \| (.+) \|$", PAGE, flags=re.MULTILINE)
        for name in re.findall(r"`([\w/.]+)`", row)
    ]
    assert len(rooms) > 30
    folder = ROOT
    for room in rooms:
        path = next((base / room for base in (ROOT / "v4forge", ROOT, folder) if (base / room).exists()), None)
        assert path, room
        folder = path.parent  # a row names further files of a folder by their names alone


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_package_is_its_docstring_and_imports_nothing(package: Path) -> None:
    (docstring,) = ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)


def test_no_module_is_longer_than_350_lines_and_no_program_than_250() -> None:
    modules = {path: 350 for path in (ROOT / "v4forge").rglob("*.py")}
    programs = {path: 250 for path in PROGRAMS}
    long = {
        path.relative_to(ROOT).as_posix(): lines(path)
        for path, most in (modules | programs).items()
        if lines(path) > most
    }
    assert long == {}


@pytest.mark.parametrize("module", BARE)
def test_what_a_bare_python_runs_needs_the_standard_library_alone(module: str) -> None:
    command = [sys.executable, "-S", "-c", f"import v4forge.{module}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
