"""Machines for the doctor's tests: files below a root, stub programs on a PATH, a stand-in for NVIDIA's library.

Nothing of the real machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvml_stand_in import Card, NvmlLibrary, pynvml

from v4forge.checkout import ROOT
from v4forge.outcomes import OK, Outcome
from v4forge.pipeline.doctor.host import Host

GIB = 2**30
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max stack size            8388608              unlimited            bytes
Max processes             96364                96364                processes
Max open files            1024                 1048576              files
Max locked memory         unlimited            unlimited            bytes
"""
# Of two H200 in a VM, as they printed it.
TOPOLOGY = (ROOT / "tests/data/topo-2xh200-vm.txt").read_text()


class Machine:
    """A healthy host with two H200, to be damaged by a test; `host` is what the checks see of it."""

    def __init__(self, folder: Path, gpus: int = 2) -> None:
        self.root, self.bin, self.work = folder / "root", folder / "bin", folder / "work"
        self.bin.mkdir()
        self.gpus = [Card(f"GPU-{number}") for number in range(gpus)]
        self.nvml = NvmlLibrary(self.gpus)
        self.topology = TOPOLOGY
        self.file("/proc/self/limits", LIMITS)
        self.file("/proc/meminfo", f"MemTotal: {512 * GIB >> 10} kB\nMemAvailable: {500 * GIB >> 10} kB\n")
        (self.root / "dev/shm").mkdir(parents=True)

    def file(self, name: str, text: str) -> Path:
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def program(self, name: str, script: str) -> Path:
        """A stub on the PATH: a shell script."""
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def host(self, profile: str = "flash", environment: Mapping[str, str] | None = None, **values: Any) -> Host:
        """The machine with this run on it; only the stubs are on its PATH."""
        if self.gpus:
            self.program("nvidia-smi", f'[ "$*" = "topo -m" ] && /bin/cat {self.file("/topology", self.topology)}')
        module = pynvml(self.nvml if self.gpus else None)
        values.setdefault("nvml", lambda: module)
        own = {"PATH": str(self.bin), "HOME": str(self.root), **(environment or {})}
        values.setdefault("torch_cuda", "13.0")
        values.setdefault("runtime", "docker")
        return Host(self.work, profile, root=self.root, environment=own, **values)


def statvfs(free: int, size: int = 0, files: int = 10**6) -> Any:
    """A file system with so many bytes and files free."""
    frame = 4096
    blocks, available = (size or 2 * free) // frame, free // frame
    values: Sequence[int] = (frame, frame, blocks, available, available, 10**7, files, files, 0, 255)
    return lambda _path: os.statvfs_result(values)


def says(result: Outcome, status: str, fact: str, fix: str = "") -> None:
    assert result.status == status, result
    assert fact in result.fact and fix in result.fix, result
    assert bool(result.fix) == (status != OK)
