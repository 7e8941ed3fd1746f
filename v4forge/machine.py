"""This machine: processor, memory, GPUs. What measured figures and an artifact say that they were made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from v4forge import gpus
from v4forge.errors import UserError

CPUINFO = Path("/proc/cpuinfo")
# By which two processors of one name are told apart: a virtual machine often gives all of them the same.
PARTS = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")


def _cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo, {} where there is none."""
    try:
        first = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name as its maker gave it, or its architecture where it has none."""
    return _cpuinfo(cpuinfo).get("model name") or platform.machine()


def cpu_identity(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name, and the numbers that tell it from others of that name: equal bytes are promised on equal
    ones."""
    found = _cpuinfo(cpuinfo)
    return ", ".join([cpu_model(cpuinfo), *(f"{part} {found[part]}" for part in PARTS if found.get(part))])


def memory_bytes() -> int:
    """The machine's memory, of which a container may be given less."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def facts() -> dict[str, Any]:
    """Processor, cores, memory, kernel, GPUs by name and their driver; without a driver there are none."""
    try:
        found = gpus.gpus()
    except UserError:
        found = []
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "kernel": platform.release(),
        "gpus": [gpu.name for gpu in found],
        "driver": found[0].driver if found else None,
    }
