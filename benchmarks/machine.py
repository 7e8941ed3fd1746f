"""What a machine can do at most, and which machine it is: the ceilings that measured stages are judged by."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from v4forge.pipeline import disk_speed
from v4forge.quantization import gptq
from v4forge.units import GB

DISK_BYTES = 4 << 30


def timed(work: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Median seconds of `work`, after one call that is not counted."""
    work()
    taken = []
    for _ in range(times):
        taken.append(clocked(work, device)[0])
    return median(taken)


def clocked(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, between synchronized clocks, and its value."""
    _wait(device)
    start = time.perf_counter()
    value = work()
    _wait(device)
    return time.perf_counter() - start, value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, folder: Path, small: bool) -> dict[str, float]:
    """What this machine can do at most: matrix products in TFLOP/s, copies and the disk in GB/s."""
    n = 1024 if small else 8192
    a = torch.randn(n, n, device=device)
    low = a.bfloat16()
    flops = 2 * n**3
    found = {
        "bf16 TFLOP/s": flops / timed(lambda: low @ low, device) / 1e12,
        "f32 TFLOP/s": flops / timed(lambda: a @ a, device) / 1e12,
    }
    with gptq.tf32():
        found["tf32 TFLOP/s"] = flops / timed(lambda: a @ a, device) / 1e12
    found["copy GB/s"] = copy_speed(1 << 24 if small else 1 << 32, device)
    speed = disk_speed.measure(folder, DISK_BYTES // 64 if small else DISK_BYTES)
    return found | {"disk write GB/s": speed.write_bytes_s / GB, "disk read GB/s": speed.read_bytes_s / GB}


def copy_speed(size: int, device: torch.device) -> float:
    """GB/s of a copy in the device's memory, counting bytes read and written."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device) / GB


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    versions = {}
    for package in ("torch", "triton", "transformers", "compressed-tensors", "llmcompressor"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "cpus": os.cpu_count(), "python": platform.python_version(), "versions": versions}
