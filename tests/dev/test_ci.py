"""dev.ci: parts beside and after each other, what they said, and their seconds beside the budget."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dev import ci
from dev.ci import Runs, Took
from v4forge.checkout import ROOT

MAKEFILE = """\
beside:
\t@touch here; for i in $$(seq 100); do [ -e there ] && exit 0; sleep 0.1; done; exit 1
meets:
\t@touch there; for i in $$(seq 100); do [ -e here ] && exit 0; sleep 0.1; done; exit 1
broken:
\t@echo 'error: it broke'; exit 3
after:
\t@[ -e there ] && echo 'it came after'
sleeps:
\t@echo $$$$ >pid; exec sleep 60
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def test_rows_run_beside_each_other_and_the_parts_of_one_after_each_other(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    took = Runs(project).all([["beside"], ["meets", "after"]])
    assert [each.code for each in took] == [0, 0, 0]
    assert {each.part for each in took} == {"beside", "meets", "after"}
    assert "it came after" in capsys.readouterr().out


def test_a_part_that_fails_hides_no_other_and_what_it_said_is_shown_whole(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "there").touch()
    took = Runs(project).all([["broken", "after"]])
    assert [(each.part, bool(each.code)) for each in took] == [("broken", True), ("after", False)]
    said = capsys.readouterr().out
    assert re.search(r"ci: broken: FAILED with exit code 2 after \d+ s; it said:\nerror: it broke\n", said)
    assert re.search(r"ci: after: ok after \d+ s; it said:\nit came after\n", said)
    assert (project / "scratch/ci/after.log").read_text() == "it came after\n"


def test_a_stop_ends_the_parts_that_run(project: Path) -> None:
    program = (
        "from pathlib import Path; from dev import ci; from v4forge.errors import run_main\n"
        f"run_main(lambda: ci.main([], Path({str(project)!r}), [['sleeps', 'after']]))\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (project / "pid").exists() or not (project / "pid").read_text().strip():
        assert time.monotonic() < end
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 130
    sleeper = int((project / "pid").read_text())
    while Path(f"/proc/{sleeper}").exists() and "\nState:\tZ" not in Path(f"/proc/{sleeper}/status").read_text():
        assert time.monotonic() < end, "what a part has started still runs"
        time.sleep(0.05)
    assert not (project / "scratch/ci/after.log").exists()


def test_the_table_marks_what_is_over_and_what_failed() -> None:
    took = [*ci.before("packages=7 docker=0"), Took("lint", 61.4), Took("test", 12.0, 2)]
    assert ci.table(took, 80.4, {"packages": 60, "lint": 60, "test": 300, "whole": 1200}) == [
        "ci              seconds   budget",
        "packages              7       60",
        "docker                0",
        "lint                 61       60  over",
        "test                 12      300  FAILED",
        "whole                80     1200",
    ]
