"""A lock file: one holder at a time, and held by what its holder started. What a file system refuses is told by its own
cause."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from v4forge import files
from v4forge.errors import UserError
from v4forge.files import changed_json, exclusive, is_locked, link_or_copy, write_text

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


def refusing(number: int) -> Callable[..., None]:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "free disk space"),
        (errno.EFBIG, "free disk space"),
        (errno.EACCES, "ls -ld "),
        (errno.EPERM, "ls -ld "),
        (errno.EROFS, "a file system that can be written"),
        (errno.EIO, "dmesg"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOTSUP, "local disk"),
        (errno.ENOENT, "choose another folder"),
    ],
)
def test_a_write_that_is_refused_keeps_its_own_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    monkeypatch.setattr(files.os, "replace", refusing(number))
    with pytest.raises(UserError) as found:
        write_text(tmp_path / "a file", "text")
    assert found.value.fact == f"cannot write {tmp_path / 'a file'}: {os.strerror(number)}"
    assert hint in found.value.hint
    assert ("free disk space" in found.value.hint) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def test_the_fault_of_another_file_is_told_of_that_one(tmp_path: Path) -> None:
    with pytest.raises(UserError) as found:
        link_or_copy(tmp_path / "none", tmp_path / "target")
    assert found.value.fact == f"cannot write {tmp_path / 'target'}: {tmp_path / 'none'}: No such file or directory"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EMLINK])
def test_what_cannot_be_linked_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_bytes(b"bytes")
    monkeypatch.setattr(files.os, "link", refusing(number))
    link_or_copy(source, target)
    assert target.read_bytes() == b"bytes" and not target.samefile(source)
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert not files.can_link(source, target.parent)


def test_a_file_that_the_kernel_links_for_nobody_is_copied(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"bytes")
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", source], capture_output=True).returncode:
        pytest.skip("nobody here makes a file immutable")
    try:
        with pytest.raises(OSError):
            os.link(source, target)
        link_or_copy(source, target)
        assert target.read_bytes() == b"bytes" and not target.samefile(source)
    finally:
        subprocess.run(["chattr", "-i", source], check=True)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    path = tmp_path / "lock"
    for locking in (exclusive(path, lambda: BUSY), changed_json(path)):
        with pytest.raises(UserError) as found, locking:
            pass
        assert found.value.fact == f"cannot lock {path}: {os.strerror(number)}: its file system has no locks"
        assert "local disk" in found.value.hint


def test_a_file_system_that_makes_no_fsync_of_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "fsync", refusing(errno.EINVAL))
    write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_file_system_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True).returncode
    ):
        pytest.skip("nothing can be mounted here")
    try:
        with pytest.raises(UserError) as found:
            write_text(tmp_path / "file", "text")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert found.value.fact == f"cannot write {tmp_path / 'file'}: Read-only file system"
    assert "can be written" in found.value.hint
