"""GPU placement, full disks and refused limits, on a docker daemon of our own: its NVIDIA hook is a stub, its disk is
small, and it may not raise limits."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from docker.client import DockerClient
from docker.errors import APIError, DockerException

from v4forge.errors import UserError
from v4forge.images import containers
from v4forge.images.containers import Engine
from v4forge.images.jobs import ULIMITS, Job

pytestmark = pytest.mark.images


@dataclass
class Daemon:
    """The daemon, an image that it has, its disk, and the hook that runs before a container with GPUs."""

    engine: Engine
    image: str
    disk: Path
    hook: Path


def write_hook(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\ncat >/dev/null\n{script}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def daemon(engine: Engine, base_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    if os.geteuid() != 0:
        pytest.skip("only root can start a docker daemon")
    folder = tmp_path_factory.mktemp("daemon")
    disk, hook, socket = folder / "disk", folder / "bin/nvidia-container-runtime-hook", f"unix://{folder}/docker.sock"
    disk.mkdir()
    hook.parent.mkdir()
    write_hook(hook, "")
    program = shutil.which("dockerd")
    assert program, "apt-get install docker.io"
    command = ["setpriv", "--bounding-set=-sys_resource", program, f"--host={socket}", f"--data-root={disk}"]
    command += [f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
    # In a network of its own: a daemon without a bridge removes the one that it finds, and it would be the host's.
    command[:0] = ["unshare", "--net"]
    command += ["--bridge=none", "--iptables=false", "--ip6tables=false"]
    environment = os.environ | {"PATH": f"{hook.parent}:{os.environ['PATH']}"}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", disk], check=True)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        client = answering(socket)
        (image,) = client.images.load(engine.client.images.get(base_image).save(chunk_size=8 << 20))
        yield Daemon(Engine(client, frozenset()), image.id, disk, hook)
    finally:
        process.terminate()
        process.wait(30)
        subprocess.run(["umount", disk], check=True)


def answering(socket: str, seconds: float = 30) -> DockerClient:
    """A client of the daemon there, once it answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return DockerClient(socket)
        except DockerException:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def gpu_job(daemon: Daemon, work: Path, gpus: int, script: str = "echo $NVIDIA_VISIBLE_DEVICES") -> Job:
    return Job(daemon.image, ["sh", "-c", script], work, gpus=gpus, name="v4forge-test-gpu")


@pytest.mark.parametrize(
    ("gpus", "devices", "placed"),
    [(1, None, "0"), (8, None, "0,1,2,3,4,5,6,7"), (2, "0,1", "0,1"), (1, "3,GPU-a1", "3,GPU-a1"), (1, "-1", "")],
)
def test_the_gpus_asked_for_are_placed(
    daemon: Daemon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
    gpus: int,
    devices: str | None,
    placed: str,
) -> None:
    if devices is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert containers.run(daemon.engine, gpu_job(daemon, tmp_path, gpus)) == 0
    assert capfdbinary.readouterr().out == f"{placed}\n".encode()


def test_a_gpu_that_the_runtime_does_not_know_is_an_error_with_a_hint(daemon: Daemon, tmp_path: Path) -> None:
    write_hook(daemon.hook, "echo 'nvidia-container-cli: device error: 9: unknown device' >&2; exit 1")
    try:
        with pytest.raises(UserError) as raised:
            containers.run(daemon.engine, gpu_job(daemon, tmp_path, 10))
    finally:
        write_hook(daemon.hook, "")
    assert raised.value.fact.startswith("the NVIDIA runtime refused the GPUs asked for: nvidia-container-cli: device")
    assert "nvidia-smi -L" in raised.value.hint
    assert daemon.engine.client.containers.list(all=True) == []


def test_limits_are_raised_where_the_daemon_may_and_left_where_it_may_not(
    daemon: Daemon, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    job = gpu_job(daemon, tmp_path, 0, "ulimit -H -l")
    created = daemon.engine.client.containers.create(job.image, ["true"], ulimits=list(ULIMITS))
    with pytest.raises(APIError, match="rlimit"):
        created.start()
    created.remove()
    assert containers.run(daemon.engine, job) == 0
    assert capfdbinary.readouterr().out.strip().isdigit()


def test_a_full_disk_is_the_daemons_not_the_stages(daemon: Daemon, tmp_path: Path) -> None:
    filler = daemon.disk / "filler"
    with open(filler, "wb") as file:
        free = os.statvfs(daemon.disk).f_bavail * os.statvfs(daemon.disk).f_frsize
        os.posix_fallocate(file.fileno(), 0, free)
    try:
        with pytest.raises(UserError) as raised:
            containers.run(daemon.engine, gpu_job(daemon, tmp_path, 0))
    finally:
        filler.unlink()
    assert raised.value.fact.startswith("the disk of the docker daemon is full")
    assert daemon.engine.client.containers.list(all=True) == []
