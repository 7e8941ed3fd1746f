"""Environments from the locks: how pip is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.env import Environment


@pytest.mark.parametrize(
    ("name", "may_not_write", "asked"),
    [
        ("host", False, ["--no-compile"]),
        ("host", True, []),
        ("serve-cpu", False, ["--no-compile"]),
        ("calib", True, ["--no-compile"]),
    ],
)
def test_pip_writes_bytecode_only_where_programs_may_not_and_would_read_it(
    name: str, may_not_write: bool, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", may_not_write)
    assert Environment(name, tmp_path).bytecode == asked
