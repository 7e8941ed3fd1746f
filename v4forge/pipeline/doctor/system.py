"""The doctor's checks of the system: memory, shared memory, limits, and what serving without docker needs."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from v4forge.checkout import ROOT
from v4forge.outcomes import Outcome, failed, ok, warning
from v4forge.pipeline import requirements
from v4forge.pipeline.doctor.host import Host
from v4forge.units import GIB

UNLIMITED = -1
# NCCL copies through it where no NVLink joins two GPUs; the 64 MiB that docker gives by itself end in a crash.
SHARED_BYTES = 1 << 30
CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True)
class Limit:
    """A row of /proc/self/limits: what a process needs at least, why, what ulimit and prlimit call it. `hard`: a
    program raises it by itself up to that one."""

    row: str
    least: int
    why: str
    letter: str
    item: str
    hard: bool = False


LIMITS = {
    "open files": Limit(
        "Max open files", 65536, "a replica of vLLM keeps connections and shards open", "n", "nofile", hard=True
    ),
    "locked memory": Limit(
        "Max locked memory", UNLIMITED, "NCCL registers memory with the network cards", "l", "memlock"
    ),
    "stack": Limit("Max stack size", 8 << 20, "compilers and torch recurse", "s", "stack"),
    "processes": Limit("Max processes", 4096, "every rank has tens of threads", "u", "nproc"),
}


def limit(host: Host, name: str) -> Outcome:
    """A limit of this shell's processes, which those that it starts have too."""
    wanted = LIMITS[name]
    found = re.search(rf"^{wanted.row} +(\S+) +(\S+)", host.read("/proc/self/limits"), flags=re.M)
    if not found:
        return warning("the kernel does not tell", f"ulimit -{wanted.letter}")
    value, hard = _number(found[2 if wanted.hard else 1]), _number(found[2])
    asked = wanted.least if wanted.letter in "nu" else wanted.least >> 10  # memory in KiB
    fix = f"ulimit -{wanted.letter} {asked}"
    if hard != UNLIMITED and not 0 <= wanted.least <= hard:
        most = "unlimited" if wanted.least == UNLIMITED else wanted.least  # in bytes
        fix = f"sudo prlimit --pid $$ --{wanted.item}={most}:{most}"  # of this shell, at once
    pids = host.read(f"{CGROUP}/pids.max").strip() if name == "processes" else ""
    if pids.isdigit() and not 0 <= value <= int(pids):
        value, fix = int(pids), "docker update --pids-limit -1 <this container>"  # where it was started
    shown, least = (_shown(count, wanted.letter) for count in (value, wanted.least))
    if name == "locked memory" and not list(host.path("/sys/class/infiniband").glob("*")):
        return ok(f"{shown}; there is no network card that NCCL would register memory with")
    if value == UNLIMITED or 0 <= wanted.least <= value:
        return ok(shown)
    return warning(f"{shown}, should be {least}: {wanted.why}", fix)


def _shown(value: int, letter: str) -> str:
    if value == UNLIMITED:
        return "unlimited"
    return f"{value:,}" if letter in "nu" else f"{value >> 10:,} KiB"


def _number(word: str) -> int:
    return UNLIMITED if word == "unlimited" else int(word)


def shared_memory(host: Host) -> Outcome:
    """/dev/shm is there and not docker's small default."""
    folder = host.path("/dev/shm")
    if not folder.is_dir():
        return host.needed("there is no /dev/shm", "sudo mount -t tmpfs -o size=16G tmpfs /dev/shm")
    found = host.statvfs(folder)
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    shown = f"{size / GIB:.2f} GiB, {free / GIB:.2f} free"
    if size < SHARED_BYTES:
        grow = "sudo mount -o remount,size=16G /dev/shm"
        return host.needed(f"{shown}: NCCL and vLLM's processes need 1 GiB; docker run gives it by --ipc=host", grow)
    if free < SHARED_BYTES // 2:
        return warning(f"{shown}: a run that was killed may have left files", "ls -l /dev/shm")
    return ok(shown)


def host_memory(host: Host) -> Outcome:
    """The host's memory holds what calibration keeps there."""

    def need(processes: int) -> int:
        return requirements.host_bytes(host.config(), host.sizes(), *host.tokens, processes)

    told = dict(re.findall(r"^(\w+): +(\d+) kB", host.read("/proc/meminfo"), flags=re.M))
    if not {"MemTotal", "MemAvailable"} <= told.keys():
        return warning("the kernel does not tell", "free -h")
    total, free = (int(told[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    whose = ""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = host.read(f"{CGROUP}/{name}").strip()
        if text.isdigit() and int(text) < total:
            total, free, whose = int(text), min(free, int(text)), " of this container's"
    fact = f"{total / GIB:.1f} GiB{whose}, {free / GIB:.1f} free; the plan needs {need(host.gpus_wanted) / GIB:.1f}"
    if need(host.gpus_wanted) > total:
        fewer = next((count for count in range(host.gpus_wanted, 0, -1) if need(count) <= total), 0)
        fix = host.make("artifact", f"GPUS={fewer}") if fewer else "free -h"
        return host.needed(fact, fix)
    if need(host.gpus_wanted) > free:
        return warning(fact, "ps aux --sort=-rss | head")
    return ok(fact)


def python(host: Host) -> Outcome:
    """The environment that `make env` builds, by its interpreter."""
    shown = f"Python {sys.version.split()[0]}, {sys.prefix}"
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        return failed(f"{shown}: the locks are for 3.11 and 3.12", "make env PYTHON=python3.11")
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        return warning(f"{shown}: not the environment of this checkout", "make env")
    return ok(shown)


def serving(host: Host) -> Outcome:
    """Serving without docker: the router, and a vLLM in its environment; its compilers where there are GPUs."""
    if host.full_size and host.chosen_runtime == "docker":
        return ok("not needed: RUNTIME=docker serves in containers")
    folder = ROOT / (".venv-serve" if host.full_size else ".venv-serve-cpu")
    build = "make env-serve-cpu" if not host.full_size else "make env-serve"
    lacks = [
        *(["haproxy"] if not host.which("haproxy") else []),
        *([f"{folder.name} with vllm"] if not (folder / "bin/vllm").exists() else []),
    ]
    if lacks:
        fix = "sudo apt-get install haproxy" if lacks[0] == "haproxy" else build
        return warning(f"make serve RUNTIME=host would miss {' and '.join(lacks)}", fix)
    if host.full_size and not _nvcc(host, folder):
        fact = "make serve RUNTIME=host would miss nvcc: DeepGEMM compiles when it first runs"
        return warning(fact, build)
    return ok(f"haproxy and {folder.name} are here")


def _nvcc(host: Host, folder: Path) -> bool:
    homes = [host.environment.get("CUDA_HOME", ""), str(folder / "cuda"), str(host.path("/usr/local/cuda"))]
    return bool(host.which("nvcc")) or any(home and Path(home, "bin/nvcc").exists() for home in homes)
