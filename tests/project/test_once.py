"""tests/support/once: what tests share is made once, whichever worker asks first, and again when what determines it
changes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import once
import pytest

ROOT = Path(__file__).resolve().parents[2]
# What each worker of a parallel run does: four tests that need the folder, whose making takes a moment.
SUITE = """
import time
import once
import pytest

@pytest.mark.parametrize("number", range(4))
def test_it_is_there(number, tmp_path_factory, pytestconfig):
    def make(folder):
        with open(pytestconfig.rootpath / "made", "a") as file:
            file.write("x")
        time.sleep(0.5)
        (folder / "whole").touch()
    assert (once.in_session(tmp_path_factory, "shared", make) / "whole").exists()
"""


@pytest.mark.parametrize("options", [("-n", "2"), ("-p", "no:xdist")], ids=["in parallel", "in one process"])
def test_a_folder_of_a_session_is_made_by_one_worker(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "test_it.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT / 'tests/support'}\n")
    command = [sys.executable, "-m", "pytest", "-q", "--basetemp", str(tmp_path / "base"), *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    for count in (1, 2):  # of another session, another one
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert (tmp_path / "made").read_text() == "x" * count


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
