"""v4forge.pipeline.disk_speed: the disk's speed, measured without a trace and kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from v4forge.errors import UserError
from v4forge.pipeline import disk_speed
from v4forge.pipeline.disk_speed import Speed

SIZE = 4 << 20


def test_a_measurement_has_both_speeds_and_leaves_nothing(tmp_path: Path) -> None:
    speed = disk_speed.measure(tmp_path, SIZE)
    assert speed.write_bytes_s > 0 and speed.read_bytes_s > 0
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_no_name_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even SIGKILL leaves nothing."""
    seen = []
    fsync = disk_speed.os.fsync
    monkeypatch.setattr(disk_speed.os, "fsync", lambda file: (seen.append(list(tmp_path.iterdir())), fsync(file)))
    disk_speed.measure(tmp_path, SIZE)
    assert seen and not any(seen)


def test_what_was_measured_is_kept_for_estimates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "scratch" / "flash"
    assert disk_speed.known(work) is None
    monkeypatch.setattr(disk_speed, "measure", lambda folder: Speed(1.5e9, 3e9))
    assert disk_speed.measured(work) == disk_speed.known(work) == Speed(1.5e9, 3e9)


@pytest.mark.parametrize("text", ["", "[]", '{"write_bytes_s": 1}', '{"write_bytes_s": 0, "read_bytes_s": 1}'])
def test_a_file_of_another_form_is_no_measurement(tmp_path: Path, text: str) -> None:
    (tmp_path / ".stamps").mkdir()
    (tmp_path / ".stamps/disk.json").write_text(text)
    assert disk_speed.known(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/none"):
        disk_speed.measure(tmp_path / "none", SIZE)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_speed.os, "write", full)
    with pytest.raises(UserError, match="No space left"):
        disk_speed.measure(tmp_path, SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_file_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * SIZE)
    disk_speed.forget(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"x" * SIZE
