"""The doctor's checks of the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from doctored import Machine, says, statvfs

from v4forge.errors import UserError
from v4forge.outcomes import FAILED, OK, WARNING
from v4forge.pipeline import disk_speed, requirements
from v4forge.pipeline.disk_speed import Speed
from v4forge.pipeline.doctor import disk

GB = 10**9


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, gpus=0)


def test_a_folder_of_ours(machine: Machine) -> None:
    machine.file("/proc/self/mounts", "/dev/vda / ext4 rw 0 0\n")
    says(disk.writable(machine.host()), OK, f"{machine.work} is yours to write, ext4")
    assert not machine.work.exists()


def test_a_folder_that_is_not_ours_to_write(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write everywhere
    with pytest.raises(UserError, match="cannot write") as found:
        disk.writable(machine.host())
    assert "sudo chown -R" in found.value.hint


def test_files_that_root_left(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine.work / "layers").mkdir(parents=True)
    left = machine.work / "layers/layer-000.safetensors"
    left.touch()
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, *rest, **more: path != left and writable(path, *rest, **more))
    host = machine.host(user=left.stat().st_uid + 1)
    whose = "root" if left.stat().st_uid == 0 else "user"
    says(
        disk.writable(host),
        FAILED,
        f"{left} belongs to {whose}",
        f"sudo chown -R $(id -u):$(id -g) {machine.work}",
    )


def test_a_folder_in_memory(machine: Machine) -> None:
    machine.file("/proc/self/mounts", f"/dev/vda / ext4 rw 0 0\ntmpfs {machine.work.parent} tmpfs rw 0 0\n")
    says(disk.writable(machine.host()), WARNING, "takes the host's memory", "SCRATCH=")


def test_every_stage_of_flash_fits_on_500_gb(machine: Machine) -> None:
    host = machine.host(statvfs=statvfs(500 * GB))
    for stage in disk.STAGES:
        says(disk.space(host, stage), OK, f"{stage} writes")


def test_the_first_stage_that_does_not_fit_fails(machine: Machine) -> None:
    """The sizes are the plan's, and the layout's behind it."""
    config = requirements.flash_config()
    upstream = requirements.sizes_of(config).upstream.total()
    host = machine.host(statvfs=statvfs(upstream + GB))
    says(disk.space(host, "fetch"), OK, f"{upstream / GB:,.1f} GB are needed")
    says(disk.space(host, "calibrate"), FAILED, "are missing", "make doctor PROFILE=flash SCRATCH=")


def test_what_is_there_already_needs_no_room(machine: Machine) -> None:
    upstream = machine.work / "upstream"
    upstream.mkdir(parents=True)
    with open(upstream / "model-00001-of-00046.safetensors", "wb") as file:
        file.truncate(requirements.sizes_of(requirements.flash_config()).upstream.total())
    says(disk.space(machine.host(statvfs=statvfs(GB)), "fetch"), OK, "fetch writes 0.0 MB")


def test_a_source_that_is_here_is_not_fetched(machine: Machine) -> None:
    says(disk.space(machine.host("tiny"), "fetch"), OK, "nothing to download")


def test_a_disk_without_room_for_files(machine: Machine) -> None:
    says(
        disk.space(machine.host(statvfs=statvfs(500 * GB, files=99)), "fetch"),
        FAILED,
        "99 more files",
        "SCRATCH=",
    )


def test_a_disk_with_room_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """That which has most, with a folder of ours where the disk is root's."""
    for name in ("small", "large"):
        (machine.root / "mnt" / name).mkdir(parents=True)
    machine.file("/proc/self/mounts", "".join(f"/dev/{name} /mnt/{name} xfs rw 0 0\n" for name in ("large", "small")))
    disks = {machine.root / "mnt/small": 300, machine.root / "mnt/large": 2000}
    stat = os.stat
    other = os.stat_result((0o40755, 1, 2**31, 2, 0, 0, 0, 0, 0, 0))
    monkeypatch.setattr(disk.os, "stat", lambda path, **more: other if path in disks else stat(path, **more))
    host = machine.host(statvfs=lambda path: statvfs(disks.get(path, 100) * GB)(path))
    make = f"make doctor PROFILE=flash SCRATCH={machine.root}/mnt/large/scratch"
    assert disk.space(host, "calibrate").fix == make
    monkeypatch.setattr(disk.os, "access", lambda *_, **__: False)
    assert disk.space(host, "calibrate").fix == (f"sudo install -d -o $USER {machine.root}/mnt/large/scratch && {make}")
    disks[machine.root / "mnt/large"] = 200
    assert "SCRATCH=<a folder on a larger disk>" in disk.space(host, "calibrate").fix


@pytest.mark.parametrize(("rate", "status"), [(2e9, OK), (0.1e9, WARNING)])
def test_a_disk_that_the_gpus_would_wait_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, rate: float, status: str
) -> None:
    monkeypatch.setattr(disk_speed, "measure", lambda _folder: Speed(rate, rate))
    found = disk.speed(machine.host())
    says(found, status, f"writes {rate / GB:.2f} GB/s", "NVMe" if status == WARNING else "")
    assert disk_speed.known(machine.work) == Speed(rate, rate)
