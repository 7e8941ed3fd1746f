"""Kinds of machines, the one that is here, and what of a plan's needs one has not."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from v4forge import gpus, machine
from v4forge.errors import UserError
from v4forge.pipeline import reference_timings, requirements
from v4forge.pipeline.run_plan import Plan
from v4forge.units import GB, GIB, decimal_size, size

KINDS = Path(__file__).with_name("machines.toml")


@dataclass(frozen=True)
class Kind:
    """A row of machines.toml. price: of an hour, None where it is not known."""

    name: str
    machine: str
    gpu: str
    gpus: int
    gpu_memory_gb: float
    memory_gib: float
    disk_gb: float
    network_gbit: float
    sources: tuple[str, ...]
    price: float | None = None

    @property
    def has(self) -> Has:
        return Has(self.gpus, int(self.gpu_memory_gb * GB), int(self.memory_gib * GIB), int(self.disk_gb * GB))

    @property
    def line(self) -> str:
        """All of it."""
        return (
            f"{self.machine}: {self.gpus} x {self.gpu} of {self.gpu_memory_gb:,g} GB, {self.memory_gib:,g} GiB of"
            f" memory, {self.disk_gb:,g} GB of disk, {self.network_gbit:,g} Gbit/s"
            f"{f', {self.price:,.2f} an hour' if self.price else '; PRICE= adds money'}"
        )

    @property
    def basis(self) -> dict[str, str]:
        """What its figures rest on, and the times of a GPU that nobody has measured."""
        told = {"machine": "; ".join(self.sources)}
        if (measured := reference_timings.layers()) and measured.device != self.gpu:
            told["GPUs"] = f"{self.gpu} has not been measured: the times are those of {measured.device}"
        return told


@dataclass(frozen=True)
class Has:
    """GPUs with the memory of one, memory and free disk, in bytes."""

    gpus: int
    gpu_bytes: int
    memory_bytes: int
    disk_bytes: int


def kinds() -> dict[str, Kind]:
    """The table."""
    rows = tomllib.loads(KINDS.read_text(encoding="utf-8"))
    return {name: Kind(name=name, **row | {"sources": tuple(row["sources"])}) for name, row in rows.items()}


def named(name: str, given: Mapping[str, Any]) -> Kind:
    """The kind of that name, with what is `given` of it. Raises UserError for a name that is not in the table."""
    if found := kinds().get(name):
        return replace(found, **{key: value for key, value in given.items() if value is not None})
    raise UserError(f"no kind of machine is called {name}", f"make plan ON={', or ON='.join(kinds())}")


def here(work: Path) -> Has:
    """This machine, with the disk below a folder."""
    try:
        found = gpus.gpus()
    except UserError:
        found = []
    memory = min((gpu.memory_bytes for gpu in found), default=0)
    return Has(len(found), memory, machine.memory_bytes(), requirements.free_bytes(work))


def missing(plan: Plan, count: int, has: Has) -> list[str]:
    """What a machine lacks for a plan on `count` GPUs, in words."""
    gpu_bytes = max((row.gpu_bytes or 0 for row in plan.rows), default=0)
    host_bytes = max((row.host_bytes or 0 for row in plan.rows), default=0)
    lacks = []
    if gpu_bytes and has.gpus < count:
        lacks.append(f"{count} GPUs of {size(gpu_bytes)}" + f", where it has {has.gpus}" * (has.gpus > 0))
    elif gpu_bytes > has.gpu_bytes:
        lacks.append(f"{size(gpu_bytes)} a GPU, where one has {size(has.gpu_bytes)}")
    if host_bytes > has.memory_bytes:
        lacks.append(f"{size(host_bytes)} of memory, where it has {size(has.memory_bytes)}")
    if plan.room_bytes > has.disk_bytes:
        lacks.append(f"{decimal_size(plan.room_bytes)} of disk, where {decimal_size(has.disk_bytes)} are free")
    return lacks


def verdict(kind: Kind, plan: Plan, count: int, work: Path | None) -> list[str]:
    """That the kind has what the plan needs, and what this machine has not. Raises UserError where the kind has not."""
    if lacks := missing(plan, count, kind.has):
        other = next(name for name in kinds() if name != kind.name)
        raise UserError(
            f"{kind.name} is too small: it needs {'; '.join(lacks)}", f"make plan ON={other}, or with fewer SAMPLES="
        )
    lacks = missing(plan, count, here(work or Path.cwd()))
    return [f"{kind.name} has all that", f"here it needs {'; '.join(lacks)}" if lacks else "this machine has it too"]


def record(kind: Kind, plan: Plan, count: int, work: Path | None) -> dict[str, Any]:
    """The same for programs."""
    lacks = {"on": missing(plan, count, kind.has), "here": missing(plan, count, here(work or Path.cwd()))}
    return {"machine": asdict(kind), "missing": lacks}
