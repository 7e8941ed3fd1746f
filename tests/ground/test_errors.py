"""How a program ends: one line for what it was told wrongly or refused, a traceback for a defect of ours alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from v4forge.checkout import ROOT

RAISED = {
    "OSError": ("OSError(5, 'Input/output error', '/dev/sdx')", "error: /dev/sdx: Input/output error"),
    "httpx": (
        "__import__('httpx').ConnectError('http://me:hunter22@x refused')",
        "error: ConnectError: http://…@x refused",
    ),
    "requests": ("__import__('requests').Timeout('late')", "error: Timeout: late"),
    "memory": ("MemoryError()", "error: MemoryError"),
}


def ended(raised: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    program = f"from v4forge.errors import run_main\ndef main():\n    raise {raised}\nrun_main(main)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("kind", RAISED)
def test_what_comes_from_outside_is_one_line_and_a_file(kind: str, tmp_path: Path) -> None:
    raised, line = RAISED[kind]
    done = ended(raised, tmp_path, V4FORGE_EVENTS=str(tmp_path / "run/logs/events.jsonl"))
    fact, hint = done.stderr.splitlines()
    assert (done.returncode, fact) == (1, line)
    (kept,) = (tmp_path / "run/logs").iterdir()
    assert hint.startswith(f"hint: cat {kept} shows where") and "Traceback" in kept.read_text()


def test_outside_a_run_it_is_kept_in_scratch_or_where_it_can_be(tmp_path: Path) -> None:
    assert "hint: cat scratch/logs/" in ended("OSError(5, 'x')", tmp_path).stderr
    other = tmp_path / "other"
    other.mkdir()
    (other / "scratch").write_text("")
    assert "hint: cat /tmp/v4forge-logs/" in ended("OSError(5, 'x')", other, V4FORGE_EVENTS="/dev/null/x/y").stderr


def test_a_defect_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    assert "KeyError" in (said := ended("KeyError('x')", tmp_path).stderr) and "Traceback" in said


def test_what_an_encoding_lacks_ends_nothing(tmp_path: Path) -> None:
    raised = "__import__('v4forge.errors').errors.UserError('an ellipsis … and more', 'none')"
    done = ended(raised, tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: an ellipsis \\u2026 and more")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"),
        ("HF_HUB_ETAG_TIMEOUT", "1.5"),
        ("MPLBACKEND", "windows"),
        ("PYTORCH_JIT", "x"),
    ],
)
def test_what_a_library_would_break_on_at_its_import_is_ignored_with_a_line(name: str, value: str) -> None:
    program = f"import v4forge, os; assert {name!r} not in os.environ; import huggingface_hub.constants"
    environment = os.environ | {"PYTHONPATH": str(ROOT), name: value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith(f"{name}={value!r} is not of this run's form: ignored")
