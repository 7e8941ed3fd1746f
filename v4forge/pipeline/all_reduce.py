"""Processes that torchrun has started add their numbers: whether the sum is right, and how fast it was made."""

from __future__ import annotations

import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from v4forge import launched
from v4forge.errors import UserError
from v4forge.units import GB

LIMIT_S = 90  # NCCL's first connection over NVLink takes seconds, over a broken fabric for ever
NUMBERS = 16 << 20
TIMES = 10
PERIOD = 251  # the numbers repeat after a prime, so that a part sent to the wrong place shows


def numbers(rank: int, count: int, device: torch.device) -> Tensor:
    """A rank's part of the sum: [count] float32, whole numbers, so that the sum is exact."""
    return (torch.arange(count, device=device) % PERIOD + rank * PERIOD).float()


def check(found: Tensor, ranks: int) -> None:
    """Raises UserError unless `found` is the sum over the ranks' numbers."""
    expected = sum(numbers(rank, len(found), found.device) for rank in range(ranks))
    if wrong := int((found != expected).sum()):
        raise UserError(
            f"the all-reduce is wrong in {wrong} of {len(found)} numbers", "sudo dmesg | grep -iE 'xid|nvlink'"
        )


def run(backend: str) -> None:
    """Adds over all processes; the first one says how it went. Raises UserError for one process, or a wrong sum."""
    place = launched.place()
    if place is None:
        raise UserError(
            "one process has nobody to add with",
            ".venv/bin/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 2 -m scripts.all_reduce",
        )
    signal.alarm(LIMIT_S)  # ends a process that hangs in a library, which no timeout of torch's reaches
    local = place.local_rank
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"torch sees {torch.cuda.device_count()} GPUs", "nvidia-smi -L")
        torch.cuda.set_device(device)
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, timeout=timedelta(seconds=LIMIT_S), device_id=bound)
    try:
        ranks = dist.get_world_size()
        value = numbers(dist.get_rank(), NUMBERS, device)
        dist.all_reduce(value)
        check(value, ranks)
        seconds = timed(device)
        if dist.get_rank() == 0:
            size = 4 * NUMBERS
            bus = 2 * (ranks - 1) / ranks * size / seconds / GB  # as nccl-tests count it
            print(f"all-reduce: {size >> 20} MiB of {ranks} processes, right; {bus:.1f} GB/s", flush=True)
    finally:
        dist.destroy_process_group()


def timed(device: torch.device) -> float:
    """Seconds of one all-reduce of NUMBERS float32, the mean of TIMES."""
    value = torch.zeros(NUMBERS, device=device)
    dist.all_reduce(value)
    dist.barrier()
    _wait(device)
    started = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(value)
    _wait(device)
    return (time.perf_counter() - started) / TIMES


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
