"""The doctor's checks of memory, shared memory, limits and what serving on the host needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from doctored import GIB, LIMITS, Machine, says, statvfs

from v4forge.outcomes import FAILED, OK, WARNING
from v4forge.pipeline.doctor import system


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path, gpus=0)


def test_a_host_with_memory_for_its_ranks(machine: Machine) -> None:
    says(system.host_memory(machine.host(gpus_wanted=8)), OK, "512.0 GiB, 500.0 free")


def test_a_host_with_too_little_memory_is_told_how_many_ranks_fit(machine: Machine) -> None:
    machine.file("/proc/meminfo", f"MemTotal: {32 * GIB >> 10} kB\nMemAvailable: {30 * GIB >> 10} kB\n")
    says(system.host_memory(machine.host(gpus_wanted=8)), FAILED, "32.0 GiB", "make artifact PROFILE=flash GPUS=4")


def test_memory_that_others_hold_is_a_warning(machine: Machine) -> None:
    machine.file("/proc/meminfo", f"MemTotal: {512 * GIB >> 10} kB\nMemAvailable: {8 * GIB >> 10} kB\n")
    says(system.host_memory(machine.host()), WARNING, "8.0 free", "ps aux")


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_a_container_has_its_own_limit(machine: Machine, name: str) -> None:
    machine.file(f"/sys/fs/cgroup/{name}", f"{8 * GIB}\n")
    says(system.host_memory(machine.host()), FAILED, "8.0 GiB of this container's", "free -h")


def test_shared_memory_is_there_and_large_enough(machine: Machine) -> None:
    says(system.shared_memory(machine.host(statvfs=statvfs(32 * GIB))), OK, "64.00 GiB")
    small = machine.host(statvfs=statvfs(64 << 20, 64 << 20))
    says(system.shared_memory(small), FAILED, "0.06 GiB", "sudo mount -o remount,size=16G /dev/shm")
    full = machine.host(statvfs=statvfs(1 << 20, 16 * GIB))
    says(system.shared_memory(full), WARNING, "may have left files", "ls -l /dev/shm")
    (machine.root / "dev/shm").rmdir()
    says(system.shared_memory(machine.host()), FAILED, "no /dev/shm", "mount -t tmpfs")


@pytest.mark.parametrize("name", system.LIMITS)
def test_limits_that_are_wide_enough(machine: Machine, name: str) -> None:
    says(system.limit(machine.host(), name), OK, "")


@pytest.mark.parametrize(
    ("name", "row", "fix"),
    [
        ("open files", "Max open files  1024  4096  files", "sudo prlimit --pid $$ --nofile=65536:65536"),
        ("stack", "Max stack size  1048576  unlimited  bytes", "ulimit -s 8192"),
        ("stack", "Max stack size  1048576  1048576  bytes", "--stack=8388608:8388608"),
        (
            "processes",
            "Max processes  1000  96364  processes",
            "ulimit -u 4096",
        ),
        ("locked memory", "Max locked memory  65536  65536  bytes", "--memlock=unlimited:unlimited"),
    ],
)
def test_limits_that_are_too_narrow(machine: Machine, name: str, row: str, fix: str) -> None:
    start = row.split("  ")[0]
    lines = [row if line.startswith(start) else line for line in LIMITS.splitlines()]
    machine.file("/proc/self/limits", "\n".join(lines))
    machine.file("/sys/class/infiniband/mlx5_0/node_type", "1")
    says(system.limit(machine.host(), name), WARNING, "should be", fix)


def test_locked_memory_matters_only_with_a_network_card(machine: Machine) -> None:
    machine.file("/proc/self/limits", LIMITS.replace("unlimited            unlimited", "65536  65536"))
    says(system.limit(machine.host(), "locked memory"), OK, "no network card")


def test_a_container_limits_processes_too(machine: Machine) -> None:
    machine.file("/sys/fs/cgroup/pids.max", "512\n")
    says(system.limit(machine.host(), "processes"), WARNING, "512, should be 4,096", "--pids-limit")


def test_a_kernel_that_tells_nothing(machine: Machine) -> None:
    machine.file("/proc/self/limits", "")
    machine.file("/proc/meminfo", "")
    for found in (system.limit(machine.host(), "stack"), system.host_memory(machine.host())):
        says(found, WARNING, "does not tell")


def test_serving_on_the_host_needs_a_router_and_a_vllm(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "ROOT", tmp_path)
    flash = machine.host(runtime="host")
    says(system.serving(flash), WARNING, "haproxy and .venv-serve", "apt-get install haproxy")
    machine.program("haproxy", "")
    says(system.serving(machine.host("tiny")), WARNING, ".venv-serve-cpu", "make env-serve-cpu")
    for name in (".venv-serve", ".venv-serve-cpu"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin/vllm").touch()
    says(system.serving(machine.host("tiny")), OK, "haproxy and .venv-serve-cpu")
    says(system.serving(flash), WARNING, "nvcc", "make env-serve")
    machine.program("nvcc", "")
    says(system.serving(flash), OK, "haproxy and .venv-serve")


def test_a_run_in_containers_needs_nothing_to_serve_on_the_host(machine: Machine) -> None:
    says(system.serving(machine.host()), OK, "RUNTIME=docker serves in containers")


def test_the_interpreter_is_one_that_the_locks_are_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.python(machine.host()).status in (OK, WARNING)
    monkeypatch.setattr(system.sys, "prefix", str(system.ROOT / ".venv"))
    says(system.python(machine.host()), OK, ".venv")
    monkeypatch.setattr(system.sys, "prefix", "/usr")
    says(system.python(machine.host()), WARNING, "not the environment of this checkout", "make env")
    monkeypatch.setattr(system.sys, "version_info", (3, 10, 0))
    says(system.python(machine.host()), FAILED, "3.11 and 3.12", "make env PYTHON=")
