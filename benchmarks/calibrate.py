"""Measures calibration at DeepSeek-V4-Flash's full dimensions on one GPU: a few layers through the real program's loop.

    python -m benchmarks.calibrate --work /scratch/bench --out benchmarks/results/calibrate-h200

Writes upstream FP4/FP8 bytes of 3 layers first (20 GB, kept in --work), then measures the machine's ceilings, the
layers on 768 x 512 tokens, and the same matrices in llm-compressor's batched GPTQ. --out gets a .json with every
number and a .svg with the timeline. --small is the same on a CPU in a minute; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import flash_layers
from benchmarks.layer_work import projection, work_of
from benchmarks.machine import ceilings, machine
from benchmarks.peer import against_peer
from benchmarks.timeline import busy, drawn, timeline
from scripts.cli import parser_for
from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import run_main
from v4forge.files import write_json, write_text
from v4forge.model.corpus import Corpus
from v4forge.pipeline import requirements
from v4forge.pipeline.disk_speed import forget
from v4forge.profiling import Span, Watch, seconds
from v4forge.quantization import calibrate, layer_files
from v4forge.quantization.layer_reports import READING, WRITING, mean_losses
from v4forge.units import GB, GIB

ORIGINAL_H = 15.09  # GPTQ of the published artifact, on eight H200


QUANTIZATION = ("Hessian", "scales", "factorize", "sweep", "refit", "errors", "pack")


def measured_layers(
    source: Checkpoint, tokens: Tensor, work: Path, device: torch.device, keep_every: int
) -> dict[str, Any]:
    """The real loop over all layers of `source`, its files not in the page cache -> spans, wall time, reports."""
    shutil.rmtree(work, ignore_errors=True)
    corpus = Corpus(tokens, "sha256", 0, "Zipf-distributed tokens")
    mark = {"benchmark": "calibrate"}
    layer_files.claim(work, mark, "refuse", print)
    for shard in source.shard_names:
        forget(source.directory / shard)
    watch = Watch(device)
    start = watch.now()
    calibrate.calibrate(
        source, corpus, work, layer_files.Settings(), mark, device, keep_every=keep_every, log=print, watch=watch
    )
    wall = watch.now() - start
    reports = [json.loads(layer_files.layer_report(work, i).read_text()) for i in source.config.layers]
    return {
        "wall_s": wall,
        "spans": [asdict(span) for span in watch.spans()],
        "peak_gpu_gib": max(r["run"][0]["peak_gpu"] for r in reports) / GIB,
        "peak_host_gib": max(r["run"][0]["peak_host"] for r in reports) / GIB,
        "reports": [{k: r[k] for k in ("layer", "attention", "tokens")} | {"lost": mean_losses(r)} for r in reports],
    }


def stages_table(found: Mapping[str, Any], config: layout.Config, tokens: int, seq_len: int) -> tuple[Table, list[Any]]:
    """Seconds a layer by stage, mean over the layers behind the first, whose time holds compilations."""
    spans = [Span(**span) for span in found["layers"]["spans"]]
    steady = list(config.layers)[1:] or list(config.layers)
    table = Table("stage", "s a layer", "rate", "share of ceiling", title="One full-size layer", title_justify="left")
    rows = []
    works = {layer: work_of(config, layer, tokens, seq_len) for layer in steady}
    by_layer = {layer: seconds([s for s in spans if s.layer == layer]) for layer in steady}
    for stage in works[steady[0]]:
        if stage in (*READING, *WRITING):  # a union of spans, because threads overlap
            taken = mean(busy([s for s in spans if s.layer == i and s.what == stage]) for i in steady)
        else:
            taken = mean(by_layer[i].get(stage, 0.0) for i in steady)
        amount, ceiling = mean(works[i][stage].amount for i in steady), works[steady[0]][stage].ceiling
        unit = 1e12 if "TFLOP" in ceiling else GB
        rate = amount / taken / unit if taken else math.nan
        share = rate / found["ceilings"][ceiling]
        rows.append({"stage": stage, "s": taken, "rate": rate, "ceiling": ceiling, "share": share})
        table.add_row(stage, f"{taken:.3f}", f"{rate:.1f} {ceiling.split()[-1]}", f"{share:.0%} of {ceiling}")
    return table, rows


def main() -> None:
    parser = parser_for("calibrate", __doc__)
    parser.prog = "python -m benchmarks.calibrate"
    add = parser.add_argument
    add(
        "--work",
        type=Path,
        required=True,
        metavar="DIR",
        help="scratch: 20 GB of source, 16 GB of results, 4 GB of tests",
    )
    add("--out", type=Path, required=True, metavar="FILE", help="gets FILE.json and FILE.svg")
    add("--layers", type=int, default=3, help="decoder layers (default: %(default)s)")
    add("--samples", type=int, default=768, help="default: %(default)s")
    add("--seq-len", type=int, default=512, help="default: %(default)s")
    add("--keep-every", type=int, default=0, help="as in calibrate; 0: no hidden states (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--no-peer", action="store_true", help="leave llm-compressor out")
    add("--small", action="store_true", help="small dimensions, to try the program out")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    upstream = args.work / "upstream"
    args.work.mkdir(parents=True, exist_ok=True)
    if not (upstream / "config.json").is_file():
        raw = flash_layers.config_dict(args.layers, args.small)
        flash_layers.write_checkpoint(upstream, raw, 0, device, print)
    source = Checkpoint(upstream)
    config = source.config
    tokens = flash_layers.zipf_tokens(args.samples, args.seq_len, config.vocab_size, 0)
    given = " ".join(sys.argv[1:]).replace(str(args.out), args.out.name).replace(str(args.work), "WORK")
    found: dict[str, Any] = {"command": f"python -m benchmarks.calibrate {given}", **machine(device)}
    found["ceilings"] = ceilings(device, args.work, args.small)
    found["peer"] = against_peer(source, tokens, device, not args.no_peer)  # warms the kernels up too
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found["layers"] = measured_layers(source, tokens, args.work / "layers", device, args.keep_every)

    console = Console(width=110)
    table, rows = stages_table(found, config, tokens.numel(), args.seq_len)
    spans = [Span(**span) for span in found["layers"]["spans"] if span["layer"] >= 0]
    compute = {i: busy([s for s in spans if s.layer == i and s.lane == "compute"]) for i in list(config.layers)[1:]}
    by_kind = {config.compress_ratios[i]: compute[i] for i in compute}
    by_kind[0] = busy([s for s in spans if s.layer == 0 and s.lane == "compute"])
    quantization = sum(row["s"] for row in rows if row["stage"] in QUANTIZATION)
    found |= {
        "stages": rows,
        "compute_s_by_layer": compute | {0: by_kind[0]},
        "quantization_s": quantization,
        "timeline": timeline(spans, 0),
    }
    flash = requirements.flash_config()
    disk = found["ceilings"]
    found["projection"] = [
        projection(flash, by_kind, args.samples, args.seq_len, gpus, *speeds)
        for gpus in (1, 8)
        for speeds in ((disk["disk read GB/s"], disk["disk write GB/s"]), (5.0, 5.0))
    ]
    out = args.out
    write_json(out.with_name(out.name + ".json"), found)
    write_text(out.with_name(out.name + ".svg"), drawn(spans))
    console.print(table)
    for line in told(found):
        console.print(line, markup=False, highlight=False)


def told(found: Mapping[str, Any]) -> list[str]:
    """The figures in words."""
    per_layer = ", ".join(f"layer {i} {s:.2f}" for i, s in sorted(found["compute_s_by_layer"].items()))
    line = found["timeline"]
    lines = [
        f"computing: {per_layer} s; of it Hessians, GPTQ and packing {found['quantization_s']:.2f} s a layer",
        f"peak memory: {found['layers']['peak_gpu_gib']:.1f} GiB GPU, {found['layers']['peak_host_gib']:.1f} GiB host",
        f"timeline: {line['wall_s']:.2f} s wall, {line['compute_s']:.2f} s computing, {line['disk_s']:.2f} s disk:"
        f" {line['ratio']:.2f} x the larger",
    ]
    peer = found["peer"]
    if "time_ratio" in peer:
        lines.append(
            f"{peer['matrices']} matrices: {peer['ours_total_s']:.2f} s, llm-compressor {peer['llmcompressor']}"
            f" {peer['theirs_total_s']:.2f} s: ratio {peer['time_ratio']:.3f}; loss ratio {peer['loss_ratio']:.6f};"
            f" {peer['equal_codes']:.2%} of codes equal"
        )
    for p in found["projection"]:
        lines.append(
            f"43 layers on {p['gpus']} GPU{'s' * (p['gpus'] > 1)}, {p['read GB/s']:.1f} GB/s read,"
            f" {p['write GB/s']:.1f} write: {p['total_s'] / 60:.1f} min = {p['arithmetic']}"
        )
    return [*lines, f"the published artifact: {ORIGINAL_H} h on 8 GPUs"]


if __name__ == "__main__":
    run_main(main)
