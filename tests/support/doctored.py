"""Machines for the doctor's tests: files below a root and stub programs on a PATH, nothing of the real machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from v4forge.checkout import ROOT
from v4forge.pipeline.doctor.host import OK, Host, Result

GIB = 2**30
DRIVER = "590.44.01"
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max stack size            8388608              unlimited            bytes
Max processes             96364                96364                processes
Max open files            1024                 1048576              files
Max locked memory         unlimited            unlimited            bytes
"""
# Of two H200 in a VM, as they printed it; their other answers are Machine's.
TOPOLOGY = (ROOT / "tests/data").joinpath("topo-2xh200-vm.txt").read_text()


class Machine:
    """A healthy host with two H200, to be damaged by a test; `host` is what the checks see of it."""

    def __init__(self, folder: Path, gpus: int = 2) -> None:
        self.root, self.bin, self.work = folder / "root", folder / "bin", folder / "work"
        self.bin.mkdir()
        self.gpus: list[dict[str, str]] = [
            {
                "index": str(number),
                "name": "NVIDIA H200",
                "uuid": f"GPU-{number}",
                "memory.total": "143771",
                "memory.used": "4",
                "driver_version": DRIVER,
                "compute_cap": "9.0",
                "ecc.mode.current": "Enabled",
                "ecc.errors.uncorrected.volatile.total": "0",
                "ecc.errors.uncorrected.aggregate.total": "0",
                "retired_pages.pending": "[N/A]",
                "mig.mode.current": "Disabled",
                "fabric.state": "Completed",
                "fabric.status": "Success",
            }
            for number in range(gpus)
        ]
        self.remapped = [{"gpu_uuid": f"GPU-{n}", "pending": "No", "failure": "No"} for n in range(gpus)]
        self.programs: list[str] = []
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

    def nvidia_smi(self) -> None:
        """The stub that answers for `gpus`; a field that no GPU has is one that the driver does not know."""
        data = self.root / "smi"
        data.mkdir(exist_ok=True)
        for name in {name for gpu in self.gpus for name in gpu}:
            (data / name).write_text("".join(f"{gpu[name]}\n" for gpu in self.gpus))
        (data / "remapped").write_text(
            "".join(f"{r['gpu_uuid']}, {r['pending']}, {r['failure']}\n" for r in self.remapped)
        )
        (data / "programs").write_text("".join(f"{line}\n" for line in self.programs))
        (data / "topology").write_text(self.topology)
        self.program(
            "nvidia-smi",
            f"""cd {data}
case "$1" in
--query-gpu=*) fields=$(echo "${{1#*=}}" | /usr/bin/tr , ' ')
  for field in $fields; do
    [ -e "$field" ] || {{ echo "Field \\"$field\\" is not a valid field to query."; exit 2; }}
  done
  /usr/bin/paste -d , $fields;;
--query-remapped-rows=*) /bin/cat remapped;;
--query-compute-apps=*) /bin/cat programs;;
topo) /bin/cat topology;;
esac""",
        )

    def host(self, profile: str = "flash", environment: Mapping[str, str] | None = None, **values: Any) -> Host:
        """The machine with this run on it; only the stubs are on its PATH."""
        if self.gpus:
            self.nvidia_smi()
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


def says(result: Result, status: str, fact: str, fix: str = "") -> None:
    assert result.status == status, result
    assert fact in result.fact and fix in result.fix, result
    assert bool(result.fix) == (status != OK)
