"""What runs of several numbers of ranks say: seconds a layer by stage, and how equal their layer files are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table

from v4forge.files import read_json
from v4forge.profiling import Span, seconds
from v4forge.quantization.layer_reports import READING, WRITING, mean_losses
from v4forge.verification.reproduce import equal_codes
from v4forge.verification.tolerances import REPLAY_EQUAL_CODES, REPLAY_LOSS_OFF


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two folders have the same layer files."""

    def digests(folder: Path) -> dict[str, str]:
        return {path.name: digest(path) for path in sorted(folder.glob("layer-*.safetensors"))}

    return digests(one) == digests(other)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def layer_walls(spans: Sequence[Span]) -> dict[int, float]:
    """Seconds from a layer's first computing to the next one's, or to the end of all."""
    begins = {
        s.layer: s.start_s for s in sorted(spans, key=lambda s: -s.start_s) if s.layer >= 0 and s.lane == "compute"
    }
    order = sorted(begins)
    ends = [begins[layer] for layer in order[1:]] + [max(s.end_s for s in spans)]
    return {layer: end - begins[layer] for layer, end in zip(order, ends, strict=True)}


def told(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's spans say, of the layers behind the first, which loads libraries: seconds a layer, mean."""
    by_rank = [[Span(**span) for span in each["spans"]] for each in measured["ranks"]]
    walls = [layer_walls(spans) for spans in by_rank]
    steady = sorted(walls[0])[1:] or sorted(walls[0])
    stages: dict[str, float] = {}
    for spans in by_rank:  # of the rank that takes longest
        mean = seconds([s for s in spans if s.layer in steady])
        for what, total in mean.items():
            stages[what] = max(stages.get(what, 0.0), total / len(steady))
    computing = {what: s for what, s in stages.items() if what not in (*READING, *WRITING)}
    return {
        "wall_s": max(each["wall_s"] for each in measured["ranks"]),
        "layer_s": fmean(max(wall[layer] for wall in walls) for layer in steady),
        "layer_s_by_layer": {layer: max(wall[layer] for wall in walls) for layer in sorted(walls[0])},
        "compute_s": sum(computing.values()),
        "exchange_s": max(each["exchange_s"] for each in measured["ranks"]) / len(walls[0]),
        "stages_s": stages,
        "peak_gpu_gib": max(each["peak_gpu_gib"] for each in measured["ranks"]),
    }


def losses(folder: Path) -> list[float]:
    return [mean_losses(read_json(path))["gptq"] for path in sorted(folder.glob("layer-*.json"))]


def against(base: Path, folder: Path, device: torch.device) -> dict[str, Any]:
    """A run's layer files beside those of another number of ranks, by layer."""
    files = sorted(path.name for path in base.glob("layer-*.safetensors"))
    equal = [equal_codes(base / name, folder / name, device) for name in files]
    off = [abs(b / a - 1) for a, b in zip(losses(base), losses(folder), strict=True)]
    within = min(equal) >= REPLAY_EQUAL_CODES and max(off) <= REPLAY_LOSS_OFF
    return {"equal_codes": equal, "loss_off": off, "within": within}


def table(rows: Mapping[int, Mapping[str, Any]]) -> Table:
    """A row a number of ranks."""
    drawn = Table(title="One full-size layer, behind the first", title_justify="left")
    for heading in ("ranks", "s a layer", "scaling", "efficiency", "exchange s", "equal codes", "loss off", "GiB"):
        drawn.add_column(heading, justify="right")
    base = min(rows)
    for size, row in sorted(rows.items()):
        speedup = rows[base]["layer_s"] / row["layer_s"]
        beside = row.get("against")
        drawn.add_row(
            str(size),
            f"{row['layer_s']:.2f}",
            f"{speedup:.2f}",
            f"{speedup * base / size:.0%}",
            f"{row['exchange_s']:.2f}",
            f"{min(beside['equal_codes']):.2%}" if beside else "",
            f"{max(beside['loss_off']):.3%}" if beside else "",
            f"{row['peak_gpu_gib']:.1f}",
        )
    return drawn
