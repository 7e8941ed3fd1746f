"""What was measured on other machines, as estimates read it: the tables of benchmarks/results, as data.

Where a file is not there, as in an image, what it holds is not known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

from v4forge import checkout
from v4forge.files import read_json
from v4forge.pipeline.disk_speed import Speed
from v4forge.units import GB, GIB

RESULTS = checkout.file("benchmarks/results")
# Of a layer's compute, the parts that grow with the tokens; factorizing, sweeping and packing see only Hessians.
BY_TOKENS = ("forward 1", "forward 2", "Hessian")


@dataclass(frozen=True)
class Layers:
    """Calibrating a layer of Flash's dimensions on `device`.

    compute_s: by attention, on one GPU. by_ranks: GPUs -> seconds a layer, source and files in memory. tokens: samples
    and their length in both. by_tokens: the share of computing that grows with them.
    """

    device: str
    tokens: tuple[int, int]
    compute_s: Mapping[str, float]
    by_ranks: Mapping[int, float]
    by_tokens: float

    def on(self, gpus: int) -> float:
        """Seconds a layer on so many GPUs, as a part of those on one: measured, or by a fit of a part that stays and
        one that is shared."""
        one = self.by_ranks[1]
        if gpus in self.by_ranks:
            return self.by_ranks[gpus] / one
        shared, stays = linear_regression([1 / ranks for ranks in self.by_ranks], list(self.by_ranks.values()))
        return (stays + shared / gpus) / one

    def layer_s(self, attention: str, gpus: int, samples: int, seq_len: int) -> float:
        """Seconds of computing a layer."""
        more = samples * seq_len / math.prod(self.tokens)
        return self.compute_s[attention] * self.on(gpus) * (1 + self.by_tokens * (more - 1))


def layers(results: Path = RESULTS) -> Layers | None:
    """The tables of calibration."""
    one, ranks = read_json(results / "calibrate-h200.json"), read_json(results / "ranks-h200-x4.json")
    if not one or not ranks:
        return None
    attention = {str(report["layer"]): report["attention"] for report in one["layers"]["reports"]}
    stages = ranks["ranks"]["1"]["stages_s"]
    samples, seq_len = ranks["tokens"]
    return Layers(
        device=one["device"],
        tokens=(samples, seq_len),
        compute_s={attention[layer]: seconds for layer, seconds in one["compute_s_by_layer"].items()},
        by_ranks={int(count): found["layer_s"] for count, found in ranks["ranks"].items()},
        by_tokens=sum(stages[name] for name in BY_TOKENS) / ranks["ranks"]["1"]["compute_s"],
    )


def disk(results: Path = RESULTS) -> Speed | None:
    """The disk of the machine that calibration was measured on."""
    found = read_json(results / "calibrate-h200.json").get("ceilings")
    return Speed(found["disk write GB/s"] * GB, found["disk read GB/s"] * GB) if found else None


@dataclass(frozen=True)
class Verify:
    """`of_disk`: how fast verify reads, hashing too, as a part of the speed that the disk had, `disk_bytes_s`.
    host_bytes: its peak memory."""

    cpus: int
    disk_bytes_s: float
    of_disk: float
    host_bytes: int


def verify(results: Path = RESULTS) -> Verify | None:
    """The figures of verify."""
    found = read_json(results / "verify-h200.json")
    if not found:
        return None
    reading = found["reading"]
    rate, disk_bytes_s = reading["bytes"] / reading["with hashing, seconds"], reading["cat GB/s"] * GB
    return Verify(found["cpus"], disk_bytes_s, rate / disk_bytes_s, int(reading["peak_host_gib"] * GIB))


def pipeline(results: Path = RESULTS) -> dict[str, Any]:
    """benchmarks/pipeline.py's: "stages" name -> {"median_s", …} on models/tiny, and what they were run with."""
    return read_json(results / "pipeline-tiny.json")
