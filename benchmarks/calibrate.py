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
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import flash_layers
from scripts.cli import parser_for
from v4forge import calibration, dispatch, experts, gptq, layers, layout, model, one_layer, plan
from v4forge.checkpoint import Checkpoint
from v4forge.corpus import Corpus
from v4forge.errors import run_main
from v4forge.files import write_json, write_text
from v4forge.ranks import Ranks
from v4forge.watch import Span, Watch, seconds

ORIGINAL_H = 15.09  # GPTQ of the published artifact, on eight H200
LINK_GBPS = 200.0  # between GPUs, for the projection: less than half of NVLink's 450 in one direction
PEER_BATCH = 32  # experts llm-compressor quantizes at a time
CHECKED = 4  # experts of a batch whose loss is computed in float64
DISK_BYTES = 4 << 30
CHUNK_BYTES = 16 << 20


def timed(work: Callable[[], Any], device: torch.device, times: int = 5) -> float:
    """Median seconds of `work`, after one call that is not counted."""
    work()
    taken = []
    for _ in range(times):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return median(taken)


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
    return found | disk_speed(folder, DISK_BYTES // 64 if small else DISK_BYTES)


def copy_speed(size: int, device: torch.device) -> float:
    """GB/s of a copy in the device's memory, counting bytes read and written."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device) / 1e9


def disk_speed(folder: Path, size: int) -> dict[str, float]:
    """Sequential GB/s of one file: written and flushed, then read with nothing of it in the page cache."""
    path = folder / "disk-speed.tmp"
    chunk = os.urandom(CHUNK_BYTES)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(size // CHUNK_BYTES):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - start
    forget(path)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.read(CHUNK_BYTES):
            pass
    read = time.perf_counter() - start
    path.unlink()
    return {"disk write GB/s": size / written / 1e9, "disk read GB/s": size / read / 1e9}


def forget(path: Path) -> None:
    """Drops a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Work:
    """What a stage of one layer has to do, and by which ceiling it is judged."""

    amount: float  # floating-point operations, or bytes
    ceiling: str


def work_of(config: layout.Config, layer: int, tokens: int, seq_len: int) -> dict[str, Work]:
    """The least that each stage must compute or move for one layer. Matrix products count 2 operations a term."""
    c, e = config, config.n_routed_experts
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    rows = tokens * c.num_experts_per_tok
    frame = sum(
        math.prod(shape)
        for name, shape in layout.layer_parameters(c, layer)
        if len(shape) == 2 and not model.EXPERT.search(name) and not name.endswith(("tid2eid", "ape"))
    )
    ratio = c.compress_ratios[layer]
    keys = seq_len + (seq_len // ratio if ratio else 0)
    attention = 2 * 2 * c.num_attention_heads * c.head_dim * keys
    weights = e * 3 * hidden * inner
    sizes = plan.sizes_of(c)
    return {
        "read": Work(sizes.upstream[f"layers.{layer}"], "disk read GB/s"),
        "decode": Work(weights * (0.5 + 1 / 32 + 2), "copy GB/s"),
        "forward 1": Work(tokens * (2 * frame + attention), "bf16 TFLOP/s"),
        "Hessian": Work(2 * rows * (hidden**2 + inner**2 + hidden * 2 * inner), "bf16 TFLOP/s"),
        "scales": Work(weights * 2, "copy GB/s"),
        "factorize": Work(e * (hidden**3 + inner**3) / 3, "f32 TFLOP/s"),
        "sweep": Work(e * (2 * inner * hidden**2 + hidden * inner**2), "tf32 TFLOP/s"),
        "errors": Work(2 * 2 * e * (2 * inner * hidden**2 + hidden * inner**2), "tf32 TFLOP/s"),
        "pack": Work(weights * (1 + 0.5 + 2), "copy GB/s"),
        "forward 2": Work(2 * rows * 3 * hidden * inner, "bf16 TFLOP/s"),
        "write": Work(sizes.artifact[f"layers.{layer}"], "disk write GB/s"),
    }


QUANTIZATION = ("Hessian", "scales", "factorize", "sweep", "errors", "pack")
DISK = ("read", "write", "hidden states")


def measured_layers(
    source: Checkpoint, tokens: Tensor, work: Path, device: torch.device, keep_every: int
) -> dict[str, Any]:
    """The real loop over all layers of `source`, its files not in the page cache -> spans, wall time, reports."""
    shutil.rmtree(work, ignore_errors=True)
    corpus = Corpus(tokens, "sha256", 0, "Zipf-distributed tokens")
    mark = {"benchmark": "calibrate"}
    layers.claim(work, mark, "refuse", print)
    for shard in source.shard_names:
        forget(source.directory / shard)
    watch = Watch(device)
    start = watch.now()
    calibration.calibrate(
        source, corpus, work, layers.Settings(), mark, device, keep_every=keep_every, log=print, watch=watch
    )
    wall = watch.now() - start
    reports = [json.loads(layers.layer_report(work, i).read_text()) for i in source.config.layers]
    return {
        "wall_s": wall,
        "spans": [asdict(span) for span in watch.spans()],
        "peak_gpu_gib": max(r["run"][0]["peak_gpu"] for r in reports) / 2**30,
        "peak_host_gib": max(r["run"][0]["peak_host"] for r in reports) / 2**30,
        "reports": [{k: r[k] for k in ("layer", "attention", "tokens")} | {"lost": lost(r)} for r in reports],
    }


def lost(report: Mapping[str, Any]) -> dict[str, float]:
    """Mean relative Hessian-weighted loss over all matrices, by method."""
    return {m: mean(v for by in report["error"].values() for v in by[m]) for m in ("gptq", "rtn")}


def against_peer(source: Checkpoint, tokens: Tensor, device: torch.device, peer: bool) -> dict[str, Any]:
    """Our GPTQ and llm-compressor's batched one on the weights and Hessians of layer 0, with the same scales.

    Theirs a module at a time, in batches of 32 experts; w1 and w3 are modules of their own there. Neither scales nor
    copies that their kernel may overwrite are in the times.
    """
    config, hf_config = source.config, model.hf_config(source.config)
    weights = model.Weights(source, device)
    root = model.load_root(weights, hf_config)
    frame = model.load_layer(weights, hf_config, 0, experts=False)
    rotary = model.Rotary(hf_config, device, weights.dtype)
    attended = [
        model.attend(frame, model.embed(root, hf_config, batch), rotary.context(batch))
        for batch in tokens.to(device).split(layers.Settings().micro_batch)
    ]
    x, indices = torch.cat([a.x for a in attended]), torch.cat([a.indices for a in attended])
    del attended, root, frame
    routed = dispatch.Dispatch(Ranks(), x, indices, config.n_routed_experts)
    sample = routed.sample(experts.SAMPLE_FACTOR * config.moe_intermediate_size)
    common = experts.Common(gptq.gram(x) / len(x), sample)
    inner, damp = config.moe_intermediate_size, layers.Settings().dampening
    ours_s, theirs_s, equal, codes = [], [], 0, 0
    losses = {"ours": 0.0, "theirs": 0.0}
    at_once = one_layer.EXPERT_BATCH[device.type]
    for first in range(0, config.n_routed_experts, PEER_BATCH):
        some = range(first, min(first + PEER_BATCH, config.n_routed_experts))
        matrices = {
            which: torch.stack([weights(f"layers.0.ffn.experts.{e}.{which}.weight", shape) for e in some])
            for which, shape in (("w1", (inner, x.shape[1])), ("w3", (inner, x.shape[1])), ("w2", (x.shape[1], inner)))
        }
        gate_up, down = torch.cat((matrices["w1"], matrices["w3"]), 1), matrices["w2"]
        h = experts.hessians(routed.rows([some]), gate_up, float(hf_config.swiglu_limit), common, some)
        problems = [(gate_up, h.hidden), (down, h.inner)]
        scales = [gptq.searched_scales(w, of.diagonal(dim1=-2, dim2=-1)) for w, of in problems]

        def ours(problems: Any = problems, scales: Any = scales) -> list[Tensor]:
            found = []
            for (w, of), scale in zip(problems, scales, strict=True):
                parts = zip(w.split(at_once), of.split(at_once), scale.split(at_once), strict=True)
                found.append(torch.cat([gptq.gptq(a, b, c, damp).codes for a, b, c in parts]))
            return [found[0][:, :inner], found[0][:, inner:], found[1]]

        if first == 0:
            ours()
        seconds_taken, ours_codes = clocked(ours, device)
        ours_s.append(seconds_taken)
        if not peer:
            continue
        cases = [
            (matrices["w1"], h.hidden, scales[0][:, :inner]),
            (matrices["w3"], h.hidden, scales[0][:, inner:]),
            (matrices["w2"], h.inner, scales[1]),
        ]
        taken = 0.0
        for (w, of, scale), mine in zip(cases, ours_codes, strict=True):
            if first == 0:
                peer_codes(w[:2], of[:2].clone(), scale[:2], damp, device)
            spent, found = peer_codes(w, of.clone(), scale, damp, device)
            taken += spent
            equal += int((found == mine).sum())
            codes += mine.numel()
            for e in range(0, len(some), max(1, len(some) // CHECKED)):
                for name, each in (("ours", mine), ("theirs", found)):
                    losses[name] += weighted_loss(w[e], each[e], scale[e], of[e])
        theirs_s.append(taken)
    result: dict[str, Any] = {"ours_s": ours_s, "ours_total_s": sum(ours_s), "matrices": 3 * config.n_routed_experts}
    if peer:
        result |= {
            "llmcompressor": version("llmcompressor"),
            "theirs_s": theirs_s,
            "theirs_total_s": sum(theirs_s),
            "time_ratio": sum(ours_s) / sum(theirs_s),
            "loss_ratio": losses["ours"] / losses["theirs"],
            "equal_codes": equal / codes,
        }
    return result


def clocked(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, between synchronized clocks, and its value."""
    _wait(device)
    start = time.perf_counter()
    value = work()
    _wait(device)
    return time.perf_counter() - start, value


def peer_codes(
    weights: Tensor, hessians: Tensor, scale: Tensor, dampening: float, device: torch.device
) -> tuple[float, Tensor]:
    """llm-compressor's quantize_weight: seconds and codes. It may overwrite `hessians`."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    wide, whole = scale.float().contiguous(), weights.float().contiguous()
    zero = torch.zeros_like(wide)
    spent, (values, _, _) = clocked(
        lambda: quantize_weight(whole, hessians, wide, zero, None, gptq.QUANT_ARGS, 128, dampening), device
    )
    return spent, (values.unflatten(-1, (-1, 128)) / wide.unsqueeze(-1)).round().to(torch.int8).flatten(-2)


def weighted_loss(weights: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    values = codes.double() * scale.double().repeat_interleave(128, -1)
    off = weights.double() - values
    return float(((off @ hessian.double()) * off).sum())


def projection(
    config: layout.Config,
    by_kind: Mapping[int, float],
    samples: int,
    seq_len: int,
    gpus: int,
    read: float,
    write: float,
) -> dict[str, Any]:
    """Wall time of the 43 layers: the larger of computing and of the disk. by_kind: compress ratio -> compute seconds.

    Computing is divided by the GPUs, because samples and experts are; the exchange of tokens between them is added.
    """
    sizes = plan.sizes_of(config)
    ratios = config.compress_ratios[: config.num_hidden_layers]
    compute = sum(by_kind[ratio] for ratio in ratios) / gpus
    rows = samples * seq_len * config.num_experts_per_tok * config.hidden_size * 2
    exchanged = 2 * rows * (gpus - 1) / gpus / gpus * len(ratios)
    exchange = exchanged / LINK_GBPS / 1e9
    read_s = plan.layer_bytes(sizes.upstream) / read / 1e9
    write_s = plan.layer_bytes(sizes.artifact) / write / 1e9
    total = max(compute + exchange, read_s + write_s)
    counts = " + ".join(f"{ratios.count(ratio)} x {by_kind[ratio]:.2f}" for ratio in sorted(by_kind))
    return {
        "gpus": gpus,
        "read GB/s": read,
        "write GB/s": write,
        "compute_s": compute,
        "exchange_s": exchange,
        "read_s": read_s,
        "write_s": write_s,
        "total_s": total,
        "arithmetic": f"max(({counts}) s / {gpus} + {exchange:.1f} s, {read_s:.0f} s read + {write_s:.0f} s write)",
    }


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


def stages_table(found: Mapping[str, Any], config: layout.Config, tokens: int, seq_len: int) -> tuple[Table, list[Any]]:
    """Seconds a layer by stage, mean over the layers behind the first, whose time holds compilations."""
    spans = [Span(**span) for span in found["layers"]["spans"]]
    steady = list(config.layers)[1:] or list(config.layers)
    table = Table("stage", "s a layer", "rate", "share of ceiling", title="One full-size layer", title_justify="left")
    rows = []
    works = {layer: work_of(config, layer, tokens, seq_len) for layer in steady}
    by_layer = {layer: seconds([s for s in spans if s.layer == layer]) for layer in steady}
    for stage in works[steady[0]]:
        if stage in DISK:  # a union of spans, because threads overlap
            taken = mean(busy([s for s in spans if s.layer == i and s.what == stage]) for i in steady)
        else:
            taken = mean(by_layer[i].get(stage, 0.0) for i in steady)
        amount, ceiling = mean(works[i][stage].amount for i in steady), works[steady[0]][stage].ceiling
        unit = 1e12 if "TFLOP" in ceiling else 1e9
        rate = amount / taken / unit if taken else math.nan
        share = rate / found["ceilings"][ceiling]
        rows.append({"stage": stage, "s": taken, "rate": rate, "ceiling": ceiling, "share": share})
        table.add_row(stage, f"{taken:.3f}", f"{rate:.1f} {ceiling.split()[-1]}", f"{share:.0%} of {ceiling}")
    return table, rows


def busy(spans: list[Span]) -> float:
    """Seconds in which at least one of the spans runs."""
    total, end = 0.0, -math.inf
    for span in sorted(spans, key=lambda s: s.start_s):
        total += max(0.0, span.end_s - max(span.start_s, end))
        end = max(end, span.end_s)
    return total


def timeline(spans: list[Span], first: int) -> dict[str, float]:
    """Wall time from layer `first` on, and how long each lane was busy in it."""
    own = [s for s in spans if s.layer >= first]
    begin = min(s.start_s for s in own if s.lane == "compute")
    end = max(s.end_s for s in own)
    late = [Span(s.layer, s.what, s.lane, max(s.start_s, begin), s.end_s, s.bytes) for s in own if s.end_s > begin]
    lanes = {lane: busy([s for s in late if s.lane == lane]) for lane in ("compute", "read", "write")}
    disk = busy([s for s in late if s.lane != "compute"])
    limit = max(lanes["compute"], disk)
    return {
        "wall_s": end - begin,
        **{f"{k}_s": v for k, v in lanes.items()},
        "disk_s": disk,
        "ratio": (end - begin) / limit,
    }


COLORS = {
    "read": "#4c78a8",
    "decode": "#9ecae9",
    "forward 1": "#54a24b",
    "Hessian": "#f58518",
    "scales": "#ffbf79",
    "factorize": "#e45756",
    "sweep": "#b279a2",
    "errors": "#d6a5c9",
    "pack": "#9d755d",
    "forward 2": "#88d27a",
    "write": "#72b7b2",
    "hidden states": "#439894",
    "sort": "#bab0ac",
}


def drawn(spans: list[Span]) -> str:
    """The timeline as SVG: a lane for the GPU, one for reading, one for writing."""
    lanes = ("compute", "read", "write")
    begin, end = min(s.start_s for s in spans), max(s.end_s for s in spans)
    width, left, height = 1100, 70, 44
    scale = (width - left - 10) / (end - begin)
    body = []
    for row, lane in enumerate(lanes):
        y = 24 + row * height
        body.append(f'<text x="4" y="{y + 20}">{lane}</text>')
        for s in sorted((s for s in spans if s.lane == lane), key=lambda s: s.start_s):
            x, w = left + (s.start_s - begin) * scale, max(0.3, (s.end_s - s.start_s) * scale)
            label = f"layer {s.layer}: {s.what}, {s.end_s - s.start_s:.3f} s"
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="30" fill="{COLORS.get(s.what, "#ccc")}">'
                f"<title>{label}</title></rect>"
            )
    for layer in sorted({s.layer for s in spans if s.lane == "compute"}):
        x = left + (min(s.start_s for s in spans if s.layer == layer and s.lane == "compute") - begin) * scale
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="156" stroke="#333"/>')
        body.append(f'<text x="{x + 3:.1f}" y="16">layer {layer}</text>')
    for second in range(0, math.ceil(end - begin) + 1, 2):
        body.append(f'<text x="{left + second * scale:.1f}" y="172">{second} s</text>')
    for i, (what, color) in enumerate(COLORS.items()):
        x, y = left + (i % 7) * 140, 188 + i // 7 * 18
        body.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{color}"/>')
        body.append(f'<text x="{x + 16}" y="{y + 10}">{what}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 230" font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<rect width="{width}" height="230" fill="white"/>', *body, "</svg>\n"])


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
    found: dict[str, Any] = {"command": " ".join(["python -m benchmarks.calibrate", *sys.argv[1:]]), **machine(device)}
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
    flash = plan.flash_config()
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
