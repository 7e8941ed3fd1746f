"""The plan of a run: its stages in order, each with disk, memory and time, and what they come to together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge.checkpoint.layout import Config
from v4forge.errors import UserError
from v4forge.pipeline import disk_speed, estimate, reference_timings, requirements
from v4forge.pipeline.disk_speed import Speed
from v4forge.pipeline.estimate import Given, StageTime, Together
from v4forge.pipeline.requirements import Step

MEASURE_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """A stage of the plan. Memory in bytes, None where it is not known; seconds with the assumptions of `basis`."""

    step: Step
    gpu_bytes: int | None
    host_bytes: int | None
    estimate: StageTime

    @property
    def seconds(self) -> float | None:
        """For the sum: what the basis assumes, where nothing better is known."""
        return self.estimate.assumed_s if self.estimate.seconds is None else self.estimate.seconds


@dataclass(frozen=True)
class Plan:
    """All that is said. room_bytes: what must be free for it, at least."""

    title: str
    rows: list[Row]
    room_bytes: int
    total: Together
    disk_basis: str

    @property
    def fullest(self) -> Step:
        return max((row.step for row in self.rows), key=lambda step: step.held_bytes)


def of_run(values: Mapping[str, Any], config: Config, given: Given, model: str) -> Plan:
    """The plan of a run with the runner's settings `values`. model: what people call what is run."""
    work, names, gpus = Path(values["work"]), estimate.names_of(values["profile"]), values["gpus"]
    sizes = requirements.sizes_of(config)
    steps = requirements.steps(names, config, sizes, values)
    estimates = estimate.of_run(names, values, work, gpus, given)
    share = math.ceil(values["samples"] / gpus)
    memory = _measured_memory(values["profile"])
    memory["calibrate"] = (
        None if values["profile"] == "tiny" else requirements.gpu_bytes(config, share, values["seq_len"]),
        memory.get("calibrate", (None, None))[1]
        or requirements.host_bytes(config, sizes, values["samples"], values["seq_len"], gpus),
    )
    rows = [Row(step, *memory.get(step.stage, (None, None)), each) for step, each in zip(steps, estimates, strict=True)]
    on_gpus = f"{gpus} GPU{'s' * (gpus > 1)}, {share} x {values['seq_len']} tokens each"
    where = on_gpus if values["profile"] == "flash" else "on CPUs"
    return Plan(
        title=f"{model}, {values['samples']} x {values['seq_len']} tokens, {where}, in {work}",
        rows=rows,
        room_bytes=requirements.room_needed(steps, names, config, sizes, values),
        total=estimate.together({row.step.stage: row.seconds for row in rows}),
        disk_basis="" if values["profile"] == "tiny" else estimate.disk_of(work, given)[1],
    )


def _measured_memory(profile: str) -> dict[str, tuple[int | None, int | None]]:
    """stage -> bytes of a GPU and of the host that were measured."""
    if profile == "tiny":
        stages = reference_timings.pipeline().get("stages", {})
        return {name: (None, found.get("peak_host_bytes")) for name, found in stages.items()}
    found = reference_timings.verify()
    return {"verify": (None, found.host_bytes)} if found else {}


def record(plan: Plan, price: float | None, free_bytes: int | None) -> dict[str, Any]:
    """The plan for programs: bytes and seconds."""
    stages = [
        {
            **dataclasses.asdict(row.step),
            "gpu_bytes": row.gpu_bytes,
            "host_bytes": row.host_bytes,
            "seconds": row.estimate.seconds,
            "assumed_s": row.estimate.assumed_s,
            "basis": row.estimate.basis,
        }
        for row in plan.rows
    ]
    return {
        "title": plan.title,
        "stages": stages,
        "disk": {
            "peak_bytes": plan.fullest.held_bytes,
            "peak_in": plan.fullest.stage,
            "must_be_free_bytes": plan.room_bytes,
            "free_bytes": free_bytes,
            "speed": plan.disk_basis,
        },
        "total_s": plan.total.seconds,
        "assumed": [row.step.stage for row in plan.rows if row.estimate.seconds is None and row.seconds],
        "unknown": list(plan.total.unknown),
        "cost": plan.total.seconds / 3600 * price if price else None,
    }


def given_speed(work: Path | None, read_bytes_s: float, write_bytes_s: float) -> Speed:
    """The disk's speed where the user says one of the two or both; for one that is 0, what is known here, or of the
    benchmark machine."""
    other = (disk_speed.known(work) if work else None) or reference_timings.disk()
    known = (other.read_bytes_s, other.write_bytes_s) if other else (0.0, 0.0)
    return Speed(write_bytes_s or known[1], read_bytes_s or known[0])


def speed_here(work: Path) -> Speed | None:
    """The speed of the disk below a folder, measured now. The folder may not be there yet; it is not made for this.
    None where measuring is not possible."""
    if requirements.free_bytes(work) < 2 * MEASURE_BYTES:
        return None
    try:
        if work.is_dir():
            return disk_speed.measured(work)
        return disk_speed.measure(next(path for path in work.absolute().parents if path.exists()), MEASURE_BYTES)
    except UserError:
        return None
