"""container_log.problems finds what a reader of a log would stop at, and nothing else."""

from __future__ import annotations

import re

import pytest
from container_log import problems


@pytest.mark.parametrize(
    "line",
    [
        "WARNING 11-24 03:43:11 [config.py:12] falling back",
        "2026-11-24 03:43:11,123 - x.y - ERROR - no",
        "[CRITICAL] no",
        "(EngineCore pid=1) \x1b[33mWARNING\x1b[0m no",
        'time="2026-11-24T03:43:11Z" level=warning msg=no',
        '{"level":"error","msg":"no"}',
        "[W1124 03:43:11.123456789 socket.cpp:200] no",
        "E1124 03:43:11.123 123 x.cc:1] no",
        "error: no scale for layers.0",
        "gcc: fatal error: no",
        "x.c:3:1: warning: no",
        "Error: no",
        "error[E0425]: no",
        "/opt/venv/lib/x.py:3: UserWarning: no",
        "Traceback (most recent call last):",
        "torch.OutOfMemoryError: no",
        "KeyboardInterrupt, then ValueError",
        "2026-11-24T03:43:11.123456789Z error: no",
        "Segmentation fault (core dumped)",
    ],
)
def test_trouble_is_found(line: str) -> None:
    assert len(problems(f"INFO before\n{line}\nafter\n")) == 1
    assert problems(line, [re.compile("^INFO")])
    assert problems(line, [re.compile(".")]) == []


@pytest.mark.parametrize(
    "line",
    [
        "INFO 11-24 03:43:11 [x.py:1] 0 errors, no warnings",
        "the standard error over 32 sequences",
        "hessian error 0.13, Hessian-weighted error: 0.2",
        "calibrate: 3/43 done, layer 3, 12 s left",
        "NO_ERROR WARNINGS_AS_TEXT",
        "-W ignore::DeprecationWarning",
        "",
    ],
)
def test_other_lines_are_left_alone(line: str) -> None:
    assert problems(line) == []


def test_lines_come_back_clean_and_in_order_also_behind_a_progress_bar() -> None:
    log = "50%\r\x1b[2K\x1b[31merror: b\x1b[0m\r\n2026-11-24T03:43:11.1Z WARNING a  \nok"
    assert problems(log) == ["error: b", "WARNING a"]
