"""The tables of a model card: precision, checks, losses, hardware, what making it took.

Pure functions of the JSON files' contents; a key that they lack is a KeyError, and the caller knows the file.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from v4forge.checkpoint import layout
from v4forge.checkpoint.layout import Config
from v4forge.checkpoint.recipe import ALIASES
from v4forge.reporting import run_record
from v4forge.reporting.tables import NONE, Cell, Json, Table, columns, number
from v4forge.units import GB, GIB, decimal_size

FORMATS = {  # of recipe.Rule: upstream's, and the artifact's
    "fp4": "FP4 E2M1, E8M0 per 32",
    "fp8": "FP8 E4M3, E8M0 per 128x128",
    "int4": "INT4, BF16 scale per 128 (GPTQ)",
    "mxfp4": "the same FP4 bytes",
    "fp8-ct": "the same FP8 bytes, scale in F32",
    "bf16": "BF16",
    "f32": "F32",
    "int": "integers",
}
LAYERS_SHOWN = 12  # of more, a summary first
# Memory of a card in 10^9 bytes, as its maker states it; all are Hopper or newer, which the kernels need.
CARDS = {"H100": 80, "H200": 141, "B200": 180}
REPLICA_SIZES = (1, 2, 4, 8)


def bytes_by_kind(config: Config) -> Counter[str]:
    """Bytes of the artifact's tensors by the kind of their rule; an alias counts as what it repeats."""
    sizes: Counter[str] = Counter()
    for name, shape in layout.parameters(config):
        rule = config.rule_for(name)
        copies = 1 + sum(original == name for original in ALIASES.values())
        for spec in layout.stored(name, shape, rule.artifact).values():
            sizes[rule.kind] += copies * spec.bytes
    return sizes


def precision(manifest: Json, sizes: Mapping[str, int]) -> Table:
    """The recipe of the manifest, with what each kind takes."""
    rows = [
        [
            Cell(rule["kind"]),
            Cell(FORMATS.get(rule["source"], rule["source"])),
            Cell(FORMATS.get(rule["artifact"], rule["artifact"])),
            Cell(decimal_size(sizes[rule["kind"]], "bytes")) if rule["kind"] in sizes else NONE,
            Cell(rule["why"]),
        ]
        for rule in manifest["recipe"]["rules"]
    ]
    return Table("precision", "Precision", columns("<tensors", "<upstream", "<here", "size", "<why"), rows)


@dataclass(frozen=True)
class LayerLoss:
    """A layer of the manifest. Losses in percent of output energy, means over its experts and their three matrices."""

    layer: int
    attention: str
    tokens: list[int]  # by expert
    starved: int
    rtn: float
    same_scales: float | None  # round-to-nearest at the scales that GPTQ begins with; None in an earlier manifest
    gptq: float


def losses(manifest: Json, config: Config) -> list[LayerLoss]:
    """The layers that GPTQ quantized."""
    found = []
    for entry in manifest["layers"]:
        if not entry["error"]:
            continue
        rtn, gptq = (_mean(entry, method) for method in ("rtn", "gptq"))
        known = all("rtn_same_scales" in by for by in entry["error"].values())
        same = _mean(entry, "rtn_same_scales") if known else None
        kind = layout.COMPRESS_RATIOS[config.compress_ratios[entry["layer"]]]
        found.append(LayerLoss(entry["layer"], kind, entry["tokens"], len(entry["blended"]), rtn, same, gptq))
    return found


def _mean(entry: Json, method: str) -> float:
    return 100 * statistics.fmean(by[method] for by in entry["error"].values())


def _loss_cells(rows: Sequence[LayerLoss]) -> list[Cell]:
    """Tokens an expert and losses of some layers together."""
    tokens = [count for row in rows for count in row.tokens]
    rtn, gptq = (statistics.fmean(getattr(row, method) for row in rows) for method in ("rtn", "gptq"))
    same = [row.same_scales for row in rows if row.same_scales is not None]
    return [
        Cell(f"{min(tokens):,}") if tokens else NONE,
        number(statistics.median(tokens) if tokens else None, 0),
        Cell(f"{sum(row.starved for row in rows):,} of {len(tokens):,}"),
        number(rtn, 3),
        number(statistics.fmean(same) if len(same) == len(rows) else None, 3),
        number(gptq, 3),
        number(gptq / rtn if rtn else None, 2),
    ]


LOSS_HEADS = (
    "fewest tokens an expert",
    "median",
    "<starved",
    "nearest, %",
    "nearest, same scales, %",
    "GPTQ, %",
    "GPTQ / nearest",
)
LOSS_NOTE = (
    "Loss is the share of the experts' output energy that quantization takes, weighted with the calibration's Hessian: "
    "means over experts and matrices, of round-to-nearest, of it at the same scales, those that GPTQ begins with, and "
    "of GPTQ. A starved expert saw fewer tokens than its width; its Hessian is filled up with that of all tokens."
)


def losses_by_layer(rows: Sequence[LayerLoss]) -> Table:
    """One row a layer."""
    lines = [[Cell(str(row.layer)), Cell(row.attention), *_loss_cells([row])] for row in rows]
    heads = columns("<layer", "<attention", *LOSS_HEADS)
    return Table("losses", "Losses by layer", heads, lines, LOSS_NOTE)


def losses_by_attention(rows: Sequence[LayerLoss]) -> Table:
    """One row a kind of attention, and all together."""
    kinds = dict.fromkeys(row.attention for row in rows)
    groups = {kind: [row for row in rows if row.attention == kind] for kind in kinds} | {"all": list(rows)}
    lines = []
    for kind, some in groups.items():
        worst = max(some, key=lambda row: row.gptq)
        place = Cell(f"{worst.gptq:.3f}", f"layer {worst.layer}")
        lines.append([Cell(kind), Cell(str(len(some))), *_loss_cells(some), place])
    heads = columns("<attention", "layers", *LOSS_HEADS, "worst layer, %")
    return Table("losses-summary", "Losses by kind of attention", heads, lines, LOSS_NOTE)


def hardware(artifact_bytes: int, utilization: float) -> Table:
    """How many cards hold the weights, at the share of their memory that serving takes."""
    rows = []
    for card, size in CARDS.items():
        room = size * GB * utilization
        fits = next((n for n in REPLICA_SIZES if n * room >= artifact_bytes), None)
        left = Cell(decimal_size(fits * room - artifact_bytes, "bytes")) if fits else NONE
        rows.append([Cell(card), Cell(f"{size} GB"), Cell(str(fits)) if fits else Cell("more than 8"), left])
    note = (
        f"Computed from the shards' size and a memory utilization of {utilization:.2f}; what is left holds the KV "
        "cache and what a forward pass needs."
    )
    heads = columns("<GPU", "memory", "GPUs a replica", "left")
    return Table("hardware", "GPUs that hold it", heads, rows, note)


def stages(run: Json) -> Table:
    """What making it took, and where: one row a stage of run.json."""
    rows = []
    for name, entry in run_record.stages(run):
        image = str(entry.get("image") or "")
        lane = (run.get("images", {}).get(image) or {}).get("lane")
        where = Cell(image.removeprefix("sha256:")[:12], f"lane {lane}") if image else Cell("no image")
        rows.append([Cell(name), number(entry.get("elapsed_s"), 1), where, Cell(machine_line(entry.get("machine")))])
    layers, together_s = run.get("layers", ()), run_record.layers_s(run)
    note = (
        "Of a stage that was resumed, or ran again with little left to do, these are the seconds of its last run alone."
        + (f" The {len(layers)} layers computed for {together_s:,.1f} s together." if together_s else "")
    )
    heads = columns("<stage", "seconds, last run", "<image", "<machine")
    return Table("stages", "What making it took", heads, rows, note)


def machine_line(machine: Json | None) -> str:
    """A machine in a line, from machine.facts()."""
    if not machine:
        return "not recorded"
    gpus = machine.get("gpus") or []
    names = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    memory = f"{(machine.get('memory_bytes') or 0) / GIB:,.0f} GiB"
    cpu = f"{machine.get('cores')} cores of {machine.get('cpu')}, {memory}"
    return f"{', '.join(names)}{driver}; {cpu}" if gpus else f"no GPU; {cpu}"


def peaks(run: Json) -> Iterator[str]:
    """The most memory that calibration had, where the layers tell."""
    for what, key in (("of a GPU", "peak_gpu_bytes"), ("of the host a process", "peak_host_bytes")):
        most = max((layer[key] for layer in run.get("layers", ())), default=0)
        if most:
            yield f"{most / GIB:.1f} GiB {what}"
