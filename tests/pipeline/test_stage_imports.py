"""What the stages import: the calibration image has its own lock alone, a checkout on a host has more."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import packages_distributions

from v4forge.checkout import ROOT
from v4forge.images import locks
from v4forge.pipeline.stages import STAGES

PROGRAM = """
import importlib, sys
absent, programs = sys.argv[1].split(","), sys.argv[2:]

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ImportError(f"{name} is not in the image")

sys.meta_path.insert(0, Absent())
for program in programs:
    importlib.import_module(program)
"""


def packages(lock: str) -> set[str]:
    text = (ROOT / locks.lock_file(lock)).read_text(encoding="utf-8")
    return {locks.package_of(line) for line in locks.parse(text)}


def test_no_stage_needs_what_the_calibration_image_lacks() -> None:
    only_here = packages("host") - packages("calib")
    absent = {
        module
        for module, names in packages_distributions().items()
        if all(name.lower().replace("_", "-") in only_here for name in names)
    }
    assert {"prometheus_client", "playwright", "jsonschema", "supervisor"} <= absent
    programs = sorted({stage.program for stage in STAGES.values()})
    words = [sys.executable, "-c", PROGRAM, ",".join(absent), *programs]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
