"""The doctor's checks of the disk: may we write there, does each stage's output fit, how fast is it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from v4forge.files import check_writable
from v4forge.outcomes import OK, NotChecked, Outcome, failed, ok, warning
from v4forge.pipeline import disk_speed, requirements
from v4forge.pipeline.doctor import containers
from v4forge.pipeline.doctor.host import Host
from v4forge.units import GB, MB

STAGES = ("fetch", "calibrate", "postprocess")
MOST_LOOKED_AT = 20_000  # files of a work folder, for their owner
# A run's files are few: a shard and a report a layer. Its caches, Python's bytecode and Triton's kernels, are more.
INODES = 10_000
# A disk that alone makes calibration take longer than this is the wrong one to rent GPUs for.
SLOW_S = 30 * 60
IN_MEMORY = ("tmpfs", "ramfs")


def writable(host: Host) -> Outcome:
    """We can write to the work folder, and to all that is in it."""
    check_writable(host.work)
    existing = _existing(host.work)
    with tempfile.TemporaryFile(dir=existing) as file:  # a share of another machine may still refuse
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    for path in _files(host.work):
        try:
            found = path.lstat()
        except FileNotFoundError:  # another check's, or a run's, that has ended
            continue
        if found.st_uid != host.user and not os.access(path, os.W_OK, follow_symlinks=False):
            whose = "root" if found.st_uid == 0 else f"user {found.st_uid}"
            fact = f"{path} belongs to {whose}: an earlier run left it that you cannot write"
            return failed(fact, f"sudo chown -R $(id -u):$(id -g) {host.work}")
    kind = _file_system(host, existing)
    if kind in IN_MEMORY and host.full_size:
        fact = f"{host.work} is {kind}, which takes the host's memory"
        return warning(fact, _elsewhere(host, 0))
    return ok(f"{host.work} is yours to write{kind and f', {kind}'}")


def _files(work: Path) -> Iterator[Path]:
    count = 0
    for folder, folders, files in os.walk(work):
        for name in (*folders, *files):
            count += 1
            if count > MOST_LOOKED_AT:
                return
            yield Path(folder, name)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _file_system(host: Host, folder: Path) -> str:
    """The kind of file system that a folder is on, "" where the kernel does not say."""
    best, kind = 0, ""
    for line in host.read("/proc/self/mounts").splitlines():
        _, point, found, *_ = [*line.split(), "", "", ""]
        if (folder == Path(point) or Path(point) in folder.parents) and len(point) >= best:
            best, kind = len(point), found
    return kind


def space(host: Host, stage: str) -> Outcome:
    """The run fits on the disk up to the end of a stage, in bytes and in files."""
    if stage == "fetch" and host.upstream:
        return ok(f"the source is {host.upstream}: nothing to download")
    names = STAGES[: STAGES.index(stage) + 1]
    case = (host.config(), host.sizes(), host.settings)
    steps = requirements.steps(names, *case)
    needed = requirements.room_needed(steps, names, *case)
    what = f"{stage} writes {_size(steps[-1].writes_bytes)}; up to its end {_size(needed)} are needed"
    larger = _elsewhere(host, needed)
    result = _fits(host, host.work, what, needed, larger)
    found = host.statvfs(_existing(host.work))
    if result.status == OK and found.f_files and found.f_favail < INODES:  # one without a table of files says 0
        fact = f"room for {found.f_favail:,} more files; the caches of a run take up to {INODES:,}"
        return failed(fact, larger)
    return result


def _elsewhere(host: Host, needed: int) -> str:
    """The doctor's command on the disk with most room, where it is another and has room for so many bytes."""
    here = os.stat(_existing(host.work)).st_dev
    rooms: list[tuple[int, Path]] = []
    for line in host.read("/proc/self/mounts").splitlines():
        device, point, *_ = [*line.split(), "", ""]
        folder = host.path(point)
        if device.startswith("/dev/") and folder.is_dir() and os.stat(folder).st_dev != here:
            found = host.statvfs(folder)
            rooms.append((found.f_bavail * found.f_frsize, folder))
    free, folder = max(rooms, default=(-1, Path()))
    if free < needed:
        return host.make("doctor", "SCRATCH=<a folder on a larger disk>")
    scratch = folder / "scratch"
    give = "" if os.access(folder, os.W_OK) else f"sudo install -d -o $USER {scratch} && "
    return give + host.make("doctor", f"SCRATCH={scratch}")


def images(host: Host) -> Outcome:
    """The images fit where docker keeps them."""
    folder, needed = containers.data_folder(host)
    if not folder.exists():
        raise NotChecked(f"docker keeps images in {folder}, which this machine does not have", "docker system df")
    if not needed:
        return ok("both images are here")
    what = f"the images that are not here may take {_size(needed)} in {folder}"
    return _fits(host, folder, what, needed, "docker system prune")  # what is in use or has a name stays


def _fits(host: Host, folder: Path, what: str, needed: int, fix: str) -> Outcome:
    found = host.statvfs(_existing(folder))
    free = found.f_bavail * found.f_frsize
    if needed > free:
        return failed(f"{what}, {_size(free)} are free: {_size(needed - free)} are missing", fix)
    return ok(f"{what}, {_size(free)} are free")


def speed(host: Host) -> Outcome:
    """The disk is not what the GPUs wait for."""
    check_writable(host.work)
    found = disk_speed.measured(host.work)
    rates = found.read_bytes_s / GB, found.write_bytes_s / GB
    time = requirements.layer_time(host.config(), host.sizes(), *host.tokens, *rates, 0.0)
    shown = f"writes {rates[1]:.2f} GB/s, reads {rates[0]:.2f} GB/s"
    if not host.full_size:
        return ok(shown)
    minutes = time.layers * time.disk_s / 60
    fact = f"{shown}: the layers' bytes alone take {minutes:.0f} min"
    if minutes * 60 > SLOW_S:
        return warning(fact, host.make("doctor", "SCRATCH=<a folder on a local NVMe disk>"))
    return ok(fact)


def _size(count: int) -> str:
    return f"{count / GB:,.1f} GB" if count >= GB // 10 else f"{count / MB:,.1f} MB"
