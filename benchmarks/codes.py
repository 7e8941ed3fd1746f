"""Ranks ways to find the codes and scales of routed experts by what their output loses, seconds a way.

    python -m benchmarks.codes --kl --device cuda --out benchmarks/results/codes-tiny-h200.json
    python -m benchmarks.codes --wide --device cuda --out benchmarks/results/codes-wide-h200.json

The error is that of the experts' weighted output on held-out tokens, relative to its energy, the mean over the layers:
far more sensitive than perplexity. On models/tiny the Hessians see `make demo`'s tokens, or --samples of them. Its rows
have two groups, so that it cannot rank what refines GPTQ: --wide has random experts of DeepSeek-V4-Flash's widths, FP4
with heavy tails, whose inputs are correlated, with experts that few and many tokens reach. --kl also runs the model
through every layer so quantized, and gives KL divergence and agreement with the source on the held-out tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.code_ways import DEFAULT, WAYS, quantized_experts
from benchmarks.lab import TINY, Lab, demo_tokens, held_out
from benchmarks.machine import machine
from benchmarks.wide_experts import SETS, wide_experts
from scripts.cli import parser_for
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError, run_main
from v4forge.files import write_json
from v4forge.intervals import Estimate, ratio, share

HELDOUT = 32, 256  # sequences, and tokens in each
WIDE_EXPERTS = 4  # of a set of --wide


@torch.no_grad()
def tiny(names: Sequence[str], samples: int, device: torch.device, kl: bool) -> list[dict[str, Any]]:
    lab = Lab(Checkpoint(Path(TINY.source)), demo_tokens(samples), [held_out(*HELDOUT)], device)
    base = lab.errors(WAYS[DEFAULT])
    exact = lab.logits(None) if kl else None
    base_kl: torch.Tensor | None = None
    rows = []
    for name in names:
        start = time.perf_counter()
        found = lab.errors(WAYS[name])
        row = {
            "way": name,
            "error": float(found.sum()),
            "against_default": ratio(found.numpy(), base.numpy()).interval().json(),
            "seconds": time.perf_counter() - start,
        }
        if exact is not None:
            served = lab.logits(WAYS[name])
            by_sequence = (exact.exp() * (exact - served)).sum((1, 2)).double().cpu()
            same = (exact.argmax(-1) == served.argmax(-1)).sum(1).cpu()
            base_kl = by_sequence if base_kl is None else base_kl
            tokens = torch.full_like(by_sequence, HELDOUT[1])
            row |= {
                "kl": ratio(by_sequence.numpy(), tokens.numpy()).interval().json(),
                "kl_against_first": ratio(by_sequence.numpy(), base_kl.numpy()).interval().json(),
                "agreement": share(same.numpy(), tokens.numpy()).json(),
            }
        rows.append(row)
        tell(row)
    return rows


@torch.no_grad()
def wide(names: Sequence[str], device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for each in SETS:
        made = wide_experts(each, WIDE_EXPERTS, device)
        base: torch.Tensor | None = None
        for name in [DEFAULT, *(n for n in names if n != DEFAULT)]:
            start = time.perf_counter()
            pair = quantized_experts(made.gate_up, made.down, made.rows, made.common, WAYS[name], made.limit)
            found = made.errors(pair)
            base = found if base is None else base
            change = ratio(found.numpy(), base.numpy()).interval().json()
            row = {"set": asdict(each), "way": name, "error": float(found.mean()), "against_default": change}
            rows.append({**row, "seconds": time.perf_counter() - start})
            tell(rows[-1])
    return rows


def tell(row: dict[str, Any]) -> None:
    where = "".join(f"{k} {v}, " for k, v in row.get("set", {}).items())
    text = f"{where}{row['way']:<42} {row['error']:.5f}  {change(row['against_default'])}"
    if "kl" in row:
        kl, same = row["kl"]["value"], row["agreement"]["value"]
        text += f"  KL {kl:.5f} ({change(row['kl_against_first'])}), same {same:.2%}"
    Console(width=200, highlight=False).print(f"{text}  {row['seconds']:.1f} s")


def change(told: dict[str, float]) -> str:
    """A ratio with its interval, in percent."""
    found = Estimate.of(told)
    return f"{100 * (found.value - 1):+7.2f} ±{50 * (found.high - found.low):.2f}%"


def main() -> None:
    parser = parser_for("codes", __doc__)
    parser.add_argument("--wide", action="store_true", help="random experts of DeepSeek-V4-Flash's widths")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WAY", help="of benchmarks/code_ways.py")
    parser.add_argument("--samples", type=int, default=TINY.samples, help="calibration samples (default: %(default)s)")
    parser.add_argument("--kl", action="store_true", help="also through the whole model; the first way is the base")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="gets the figures as JSON")
    args = parser.parse_args()
    if unknown := [name for name in args.ways if name not in WAYS]:
        raise UserError(f"there is no way called {unknown[0]!r}", f"one of: {', '.join(WAYS)}")
    device = torch.device(args.device)
    rows = wide(args.ways, device) if args.wide else tiny(args.ways, args.samples, device, args.kl)
    if args.out:
        command = f"python -m benchmarks.codes {' '.join(sys.argv[1:])}"
        samples = {} if args.wide else {"samples": args.samples}
        write_json(args.out, {"command": command, **machine(device), **samples, "default": DEFAULT, "rows": rows})


if __name__ == "__main__":
    run_main(main)
