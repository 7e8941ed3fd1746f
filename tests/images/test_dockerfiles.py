"""A step of a Dockerfile that runs a program of ours mounts all that the program imports. A build finds out too, after
minutes; CI builds no serving image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from v4forge.checkout import ROOT
from v4forge.images.definitions import IMAGES

MOUNT = re.compile(r"--mount=type=bind,source=(\S+),target=/dev/shm/build/(\S+)")
PROGRAM = re.compile(r"\bpython3? (?:-m (scripts\.\w+)|(docker/\S+\.py))")
STEPS = {
    f"{image.name}-{number}": step
    for image in IMAGES.values()
    for number, step in enumerate(
        re.findall(r"^RUN (.*?)(?=^\S|\Z)", (ROOT / image.dockerfile).read_text(encoding="utf-8"), flags=re.M | re.S)
    )
    if PROGRAM.search(step) and MOUNT.search(step)
}


def test_steps_are_found() -> None:
    assert len(STEPS) >= 6


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_what_a_program_imports_is_mounted(step: str, tmp_path: Path) -> None:
    for source, target in MOUNT.findall(step):
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / target)
        elif source != "wheels":  # there for who has some
            shutil.copy(ROOT / source, tmp_path / target)
    for module, file in PROGRAM.findall(step):
        code = f"import runpy; runpy.run_{'module' if module else 'path'}({module or file!r}, run_name='imported')"
        done = subprocess.run(  # without the environment's packages, which an image does not have yet
            [sys.executable, "-S", "-c", code], cwd=tmp_path, env={"PYTHONPATH": "."}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
