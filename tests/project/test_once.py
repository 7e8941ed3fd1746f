"""What tests share is made once: by tests/support/once whichever worker asks first, and again when what determines it
changes; by a file's own fixtures because `make test` gives a file to one worker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import once
import pytest

ROOT = Path(__file__).resolve().parents[2]
# What each of two files does: four tests that need the folder of the session, whose making takes a moment, and what is
# made for the file.
SUITE = """
import time
import once
import pytest

@pytest.fixture(scope="module")
def of_the_file(pytestconfig):
    with open(pytestconfig.rootpath / "of-a-file", "a") as file:
        file.write("x")

@pytest.mark.parametrize("number", range(4))
def test_it_is_there(number, of_the_file, tmp_path_factory, pytestconfig):
    def make(folder):
        with open(pytestconfig.rootpath / "made", "a") as file:
            file.write("x")
        time.sleep(0.5)
        (folder / "whole").touch()
    assert (once.in_session(tmp_path_factory, "shared", make) / "whole").exists()
"""
(PARALLEL,) = re.findall(r"^parallel = (.*)", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize(
    "options", [PARALLEL.split(), ("-p", "no:xdist")], ids=["as make test runs it", "in one process"]
)
def test_what_tests_share_is_made_by_one_worker(tmp_path: Path, options: Sequence[str]) -> None:
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT / 'tests/support'}\n")
    command = [sys.executable, "-m", "pytest", "-q", "--basetemp", str(tmp_path / "base"), *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    for count in (1, 2) if "no:xdist" in options else (1,):  # of another session, another one
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert (tmp_path / "made").read_text() == "x" * count
        assert (tmp_path / "of-a-file").read_text() == "xx" * count


def test_what_is_kept_is_made_again_when_a_part_changes(pytestconfig: pytest.Config) -> None:
    made: list[Path] = []

    def kept(*parts: bytes) -> Path:
        return once.kept(pytestconfig.cache, "of-this-test", list(parts), made.append)

    first = kept(b"lock", b"program")
    assert kept(b"lock", b"program") == first and len(made) <= 1
    other = kept(b"lock", b"another program")
    assert other != first and not first.exists()
    assert kept(b"lockanother", b" program") != other
    assert kept(b"lock", b"program") == first


def test_what_could_not_be_made_is_not_kept(pytestconfig: pytest.Config) -> None:
    def failing(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError

    for _ in range(2):
        with pytest.raises(ValueError):
            once.kept(pytestconfig.cache, "of-this-failure", [], failing)


def test_what_is_in_the_making_is_left_to_who_makes_it(pytestconfig: pytest.Config) -> None:
    """A second worker, which asks meanwhile, waits for it."""
    made: list[Path] = []

    def make(folder: Path) -> None:
        time.sleep(0.5)  # in which the other has asked
        (folder / "whole").touch()
        made.append(folder)

    part = os.urandom(8)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(once.kept, pytestconfig.cache, "of-two", [part], make) for _ in range(2)]
        folders = {each.result() for each in asked}
    assert len(made) == len(folders) == 1 and (folders.pop() / "whole").exists()
