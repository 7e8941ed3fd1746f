"""Measures the first half of a decoder layer at DeepSeek-V4-Flash's dimensions, above all attention, and its memory.

    python -m benchmarks.attention --out benchmarks/results/attention-h200.json

"forward 1" of calibration: each kind of layer (sliding, a compressed key for 4 and for 128 tokens) over tokens in
micro-batches, with attention by windows as it is ("now"), and as it was, every query with every key in eager torch and
transformers' indexer ("before"). Seconds are a layer's for all samples, of some micro-batches timed by CUDA events.
Then what the kernels of one pass take, and attention's kernel in other forms. --small tries it out on a CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.flash_layers import config_dict, random_tensor, zipf_tokens
from benchmarks.machine import machine
from scripts.cli import parser_for
from v4forge.checkpoint import layout
from v4forge.checkpoint.formats import Shape
from v4forge.checkpoint.recipe import rule_for
from v4forge.errors import run_main
from v4forge.files import write_json
from v4forge.model import attention, deepseek_v4, drafts
from v4forge.model.layer_classes import ATTENTION, hf
from v4forge.quantization.layer_files import Settings
from v4forge.units import GIB

KINDS = {"sliding": 0, "compressed by 4": 1, "compressed by 128": 2}  # layers of flash_layers.config_dict
SHAPES = ((768, 512), (192, 2048), (48, 8192))  # samples and tokens of each: as many tokens
TIMED = 6  # micro-batches behind the first
# queries, heads, keys, warps and stages of the kernel's programs; the first are what it has
FORMS = (
    (16, 4, 32, 8, 3),
    (16, 4, 32, 8, 2),
    (16, 4, 64, 8, 2),
    (8, 8, 32, 8, 3),
    (32, 2, 32, 8, 3),
    (16, 4, 32, 4, 3),
)
Row = dict[str, Any]


class RandomWeights(deepseek_v4.Weights):
    """Of a config alone, as flash_layers makes them."""

    def __init__(self, config: layout.Config, device: torch.device) -> None:
        super().__init__(SimpleNamespace(config=config), device)  # type: ignore[arg-type]
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, name: str, shape: Shape) -> Tensor:
        made = random_tensor(name, shape, self.checkpoint.config, self._generator)
        return made if rule_for(name).source in ("f32", "int") else made.to(self.dtype)


@contextmanager
def as_before(layer: Any, config: Any, seq: int) -> Iterator[None]:
    """The layer with every query meeting every key, 2^25 logits at a time, and with transformers' indexer."""
    whole: dict[tuple[int, torch.device], Tensor] = {}

    def eager(
        module: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float, **_: Any
    ) -> Any:
        place = (len(query), query.device)
        if place not in whole:
            one = drafts.chain_mask(seq, 1, config.sliding_window, query.dtype, query.device)
            whole[place] = one.expand(len(query), -1, -1, -1)
        compressed = key.shape[2] - seq
        masks = (whole[place], bias[..., bias.shape[-1] - compressed :]) if bias is not None and compressed else ()
        mask = torch.cat(masks, -1) if masks else whole[place]
        return attention.attention(module, query, key, value, mask, scaling)

    compressor = layer.self_attn.compressor
    ours = getattr(compressor, "indexer", None)
    if ours is not None:
        with deepseek_v4.unfilled():
            compressor.indexer = hf.DeepseekV4Indexer(config)
        deepseek_v4.materialize(compressor.indexer, ours.state_dict(), config, next(ours.parameters()).device)
    hf.ALL_ATTENTION_FUNCTIONS.register(ATTENTION, eager)
    try:
        with mock.patch.object(attention, "LOGITS", 1 << 25):
            yield
    finally:
        hf.ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention.attention)
        if ours is not None:
            compressor.indexer = ours


def timed(work: Callable[[int], Any], count: int, device: torch.device) -> tuple[float, float]:
    """Seconds of `work` a time, the first not counted, and the most memory held beside what was there, in GiB."""
    work(0)
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(count):
            work(i)
        return (time.perf_counter() - start) / count, 0.0
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for i in range(count):
        work(i)
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / count, (torch.cuda.max_memory_allocated() - held) / GIB


def layers_rows(
    config: layout.Config, samples: int, seq: int, device: torch.device, kinds: list[str]
) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """A row for each kind of layer, and a pass to look into."""
    own, weights = deepseek_v4.hf_config(config), RandomWeights(config, device)
    rotary = deepseek_v4.Rotary(own, device, torch.bfloat16)
    batch = min(samples, Settings().micro_batch(seq))
    tokens = zipf_tokens(batch, seq, config.vocab_size, 0).to(device)
    context = rotary.context(tokens)
    generator = torch.Generator(device).manual_seed(1)
    streams = torch.randn(batch, seq, own.hc_mult, own.hidden_size, generator=generator, device=device).bfloat16()
    for kind in kinds:
        layer = deepseek_v4.load_layer(weights, own, KINDS[kind], experts=False)

        def work(_: int, layer: Any = layer) -> deepseek_v4.Attended:
            return deepseek_v4.attend(layer, streams, context)

        row: Row = {"layer": kind, "samples": samples, "tokens": seq}
        now = work(0)
        passes = samples / batch
        seconds, row["now_gib"] = timed(work, TIMED, device)
        row["now_s"] = passes * seconds
        try:
            with as_before(layer, own, seq):
                was = work(0)
                seconds, row["before_gib"] = timed(work, TIMED, device)
            row["before_s"] = passes * seconds
            row["streams_differ"] = float(
                (now.carried.double() - was.carried.double()).norm() / was.carried.double().norm()
            )
            row["same_experts"] = float((now.indices.sort(-1).values == was.indices.sort(-1).values).double().mean())
            del was
        except torch.OutOfMemoryError as error:
            row["before"] = str(error).partition(".")[0]
        yield row, partial(work, 0)


def looked_into(work: Callable[[], Any], passes: float) -> Row:
    """The device's time of one pass by kernel, the longest first, and the pass as the host sees it: seconds a layer."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    events = [e for e in recorded.key_averages() if e.self_device_time_total and e.device_type.name == "CUDA"]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e6
    return {
        "wall_s": passes * wall,
        "device_s": passes * total,
        "launches": sum(e.count for e in events),
        "kernels": [[e.key[:90], e.count, passes * e.self_device_time_total / 1e6] for e in events[:16]],
    }


def forms_rows(config: layout.Config, device: torch.device) -> Iterator[Row]:
    """Attention's kernel alone, 8 samples of 512 tokens with 128 compressed keys."""
    from v4forge.model import kernels

    own = deepseek_v4.hf_config(config)
    batch, seq, heads, width = 8, 512, own.num_attention_heads, own.head_dim
    generator = torch.Generator(device).manual_seed(2)
    query = torch.randn(batch, seq, heads, width, generator=generator, device=device).bfloat16().transpose(1, 2)
    key = torch.randn(batch, 1, seq + seq // 4, width, generator=generator, device=device).bfloat16()
    bias, sinks = torch.zeros(batch, 1, seq, seq // 4, device=device).bfloat16(), torch.zeros(heads, device=device)
    seen = batch * sum(min(i + 1, own.sliding_window) + (i + 1) // 4 for i in range(seq))
    for form in FORMS:
        names: Row = dict(zip(("QUERIES", "HEADS", "KEYS", "WARPS", "STAGES"), form, strict=True))
        row = {name.lower(): value for name, value in names.items()}
        with mock.patch.multiple(kernels, **names):
            try:
                taken, _ = timed(
                    lambda _: kernels.attended(query, key, bias, sinks, width**-0.5, own.sliding_window, 4), 20, device
                )
                row |= {"ms": 1e3 * taken, "tflops": 4 * seen * heads * width / taken / 1e12}
            except Exception as error:  # a form that does not fit is told, and the others go on
                row["failed"] = str(error)[:100]
        yield row


def main() -> None:
    parser = parser_for("attention", __doc__)
    parser.prog = "python -m benchmarks.attention"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets the figures as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="small dimensions, to try the program out")
    args = parser.parse_args()
    run(args.out, torch.device(args.device), args.small)


@torch.no_grad()
def run(out: Path, device: torch.device, small: bool) -> None:
    config = layout.parse_config(config_dict(3, small), "the benchmark's config")
    found: Row = {"command": f"python -m benchmarks.attention {' '.join(sys.argv[1:])}", **machine(device)}
    found |= {"layers": [], "inside": [], "forms": []}
    table = Table("layer", "samples", "before", "now", "ratio", "held before", "now", "streams", title="forward 1")
    for samples, seq in [(2, 300)] if small else SHAPES:
        for row, work in layers_rows(config, samples, seq, device, list(KINDS)):
            found["layers"].append(row)
            before = row.get("before_s", float("nan"))
            cells = (f"{before:.3f} s", f"{row['now_s']:.3f} s", f"{before / row['now_s']:.2f}")
            held = (f"{row.get('before_gib', float('nan')):.2f} GiB", f"{row['now_gib']:.2f} GiB")
            differ = f"{row.get('streams_differ', float('nan')):.1e}, experts {row.get('same_experts', 0):.2%}"
            table.add_row(row["layer"], f"{samples} x {seq}", *cells, *held, differ)
            if device.type == "cuda" and seq == SHAPES[0][1]:
                inside = looked_into(work, samples / Settings().micro_batch(seq))
                found["inside"].append({"layer": row["layer"]} | inside)
    console = Console(width=150, highlight=False)
    console.print(table)
    for inside in found["inside"]:
        console.print(f"{inside['layer']}: {inside['wall_s']:.3f} s, {inside['device_s']:.3f} s of kernels, a layer")
        for name, count, seconds in inside["kernels"]:
            console.print(f"  {seconds:.4f} s  {count:4}  {name}", markup=False)
    if device.type == "cuda":
        found["forms"] = list(forms_rows(config, device))
        for row in found["forms"]:
            console.print(row)
    write_json(out, found)


if __name__ == "__main__":
    run_main(main)
