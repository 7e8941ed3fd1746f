"""Every hint that a test sees, of our code in its process or of a program that it runs, is judged: a command that it
names has to be there (dev.hints). A hint that the test itself makes up is not ours."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from v4forge import hints

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / folder}/" for folder in ("v4forge", "scripts", "dev"))
# Through which a hint goes that somebody else has made.
PASSING = tuple(str(ROOT / "v4forge" / name) for name in ("errors.py", "outcomes.py", "hints.py"))
HINT = re.compile(r"^hint: (.+)$", re.MULTILINE)
_judged: dict[str, list[str]] = {}


@contextmanager
def judged() -> Iterator[list[str]]:
    """Within the block what is wrong with hints that appear is put into the list."""
    found: list[str] = []
    told, communicate = hints.told, subprocess.Popen.communicate

    def heard(hint: str) -> str:
        said = told(hint)
        if _maker().startswith(OURS):
            found.extend(_faults(said))
        return said

    def read(process: subprocess.Popen[Any], *arguments: Any, **settings: Any) -> tuple[Any, Any]:
        outputs = communicate(process, *arguments, **settings)
        for output in outputs:
            text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
            if "hint: " in text:
                found.extend(fault for hint in HINT.findall(text) for fault in _faults(hint))
        return outputs

    with mock.patch.object(hints, "told", heard), mock.patch.object(subprocess.Popen, "communicate", read):
        yield found


def _maker() -> str:
    """The file that has made the hint which is on its way."""
    frame = sys._getframe(2)
    while frame.f_back and (frame.f_code.co_filename in PASSING or frame.f_code.co_filename == "<string>"):
        frame = frame.f_back
    return frame.f_code.co_filename


def _faults(hint: str) -> list[str]:
    if hint not in _judged:
        from dev import hints as judge

        _judged[hint] = judge.faults(hint)
    return _judged[hint]
