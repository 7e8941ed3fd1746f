"""A lock file: one holder at a time, and held by what its holder started."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from v4forge import files
from v4forge.errors import UserError
from v4forge.files import exclusive, is_locked

BUSY = UserError("somebody else is at work here", "wait")


def test_a_held_lock_file_refuses_the_next_and_lets_go_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_ATTEMPTS", 2)
    path = tmp_path / "new" / "lock"
    with exclusive(path, lambda: BUSY):
        assert is_locked(path)
        with pytest.raises(UserError, match="somebody else"), exclusive(path, lambda: BUSY):
            pass
    assert not is_locked(path)
    with exclusive(path, lambda: BUSY):
        pass


def test_a_program_that_got_the_descriptor_holds_the_lock_after_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with exclusive(path, lambda: BUSY) as descriptor:
        child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    try:
        assert is_locked(path)
    finally:
        child.kill()
        child.wait()
    assert not is_locked(path)


def test_a_lock_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"), exclusive(tmp_path / "file" / "lock", lambda: BUSY):
        pass
    os.mkdir(tmp_path / "lock")
    with pytest.raises(UserError, match=r"cannot write .*/lock"), exclusive(tmp_path / "lock", lambda: BUSY):
        pass
