"""Which GPUs each replica gets: those that are asked for, those that a scheduler has given this shell, or all."""

from __future__ import annotations

import os
from collections.abc import Sequence

from v4forge import gpus
from v4forge.errors import UserError
from v4forge.gpus import Gpu, NoDriver

SCHEDULER = "CUDA_VISIBLE_DEVICES"
MIG = "MIG-"
EXAMPLE = "make serve DEVICES=0,1,2,3"


def placed(devices: str, replicas: int, width: int) -> list[list[str]]:
    """The GPUs of each replica, `width` of them, by UUID; by the names asked for where there is no driver to ask.

    devices: DEVICES, indexes of nvidia-smi or UUIDs, replica by replica, or "" for those of CUDA_VISIBLE_DEVICES, else
    all: then by how they are joined. replicas: 0 for as many as there are GPUs for. Raises UserError for GPUs that are
    not here, are slices of one, or are too few.
    """
    names = _names(devices)
    try:
        here = gpus.gpus()
    except NoDriver:
        if not devices:
            raise
        order = names or []
    else:
        chosen = here if names is None else [_named(name, here) for name in names]
        order = [gpu.uuid for gpu in chosen]
        if not devices and len(set(order)) == len(order):
            order = [gpu.uuid for gpu in _joined(chosen, width)]
    if len(set(order)) < len(order):
        raise UserError(f"{_source(devices)} names a GPU twice", EXAMPLE)
    groups = [order[start : start + width] for start in range(0, len(order), width)]
    whole = [group for group in groups if len(group) == width]
    count = replicas or len(whole)
    if not whole or count > len(whole):
        fact = f"{count or 1} replicas of {width} GPUs need {(count or 1) * width}, there are {len(order)}"
        raise UserError(fact, f"make serve REPLICAS={len(whole)}" if whole else _fewer(len(order)))
    return whole[:count]


def shown(devices: Sequence[str]) -> str:
    """GPUs as nvidia-smi numbers them, where it knows them."""
    try:
        indexes = {gpu.uuid: str(gpu.index) for gpu in gpus.gpus()}
    except UserError:
        indexes = {}
    return ",".join(indexes.get(device, device) for device in devices)


def _fewer(there: int) -> str:
    return f"make serve TP={1 << (there.bit_length() - 1)}" if there else "nvidia-smi -L"


def _source(devices: str) -> str:
    return f"DEVICES={devices}" if devices else f"{SCHEDULER}={os.environ[SCHEDULER]}"


def _names(devices: str) -> list[str] | None:
    """The GPUs asked for or given by a scheduler, as they are named; None where neither says any."""
    given = devices or os.environ.get(SCHEDULER)
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name.startswith(MIG):
            raise UserError(f"{name} is a slice of a GPU, by MIG; a replica takes whole ones", EXAMPLE)
        if not (name.isdecimal() or name.startswith("GPU-") or name == "-1"):
            raise UserError(f"{_source(devices)} is not a list of GPUs", EXAMPLE)
    if not names or "-1" in names:
        raise UserError(f"{_source(devices)} leaves no GPU", f"unset {SCHEDULER}, or {EXAMPLE}")
    return names


def _named(name: str, here: Sequence[Gpu]) -> Gpu:
    """The GPU of an index or of the beginning of a UUID, as CUDA takes them."""
    found = [gpu for gpu in here if name == str(gpu.index) or (not name.isdecimal() and gpu.uuid.startswith(name))]
    if len(found) != 1:
        fact = f"{name} is the beginning of {len(found)} GPUs' UUIDs" if found else f"there is no GPU {name}"
        raise UserError(fact, "nvidia-smi -L lists them; make serve DEVICES=<some of them>")
    return found[0]


def _joined(chosen: Sequence[Gpu], width: int) -> list[Gpu]:
    """GPUs in the order in which replicas take them: pairs as they are joined, wider groups from one NUMA node."""
    if width == 1 or len(chosen) <= width:
        return sorted(chosen, key=lambda gpu: gpu.index)
    topology = gpus.topology()
    by_index = {gpu.index: gpu for gpu in chosen}
    if width == 2:
        return [by_index[index] for pair in gpus.pairs(topology, by_index) for index in pair]
    return sorted(chosen, key=lambda gpu: (topology.numa.get(gpu.index, ""), gpu.index))
