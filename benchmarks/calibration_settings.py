"""Compares what calibration reads: tokens a sample, kinds of text, and what a Hessian takes of all tokens'.

    python -m benchmarks.calibration_settings --device cuda --out benchmarks/results/calibration-settings-tiny-h200.json
    python -m benchmarks.calibration_settings --wide --device cuda --out benchmarks/results/blends-wide-h200.json

The error is that of benchmarks/codes.py, by calibration's own way to find codes: of the experts' weighted output on
held-out tokens. A row is the mean over draws of the calibration documents, told beside the present setting: its
interval is over held-out sequences, and `draws` says how the draws differ. Lengths and blends are judged on 256 and on
2,048 tokens a sequence, kinds of text on every kind. --wide is of blends alone, on benchmarks/wide_experts.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import calibration_texts
from benchmarks.code_ways import BLENDS, NOW, Way, quantized_experts
from benchmarks.codes import WIDE_EXPERTS, change
from benchmarks.lab import TINY, Lab, demo_tokens, held_out
from benchmarks.machine import machine
from benchmarks.wide_experts import Set, wide_experts
from scripts.cli import parser_for
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import run_main
from v4forge.files import write_json
from v4forge.intervals import ratio

LENGTHS = (TINY.seq_len, 128, 512, 2048)  # the present one first
TOKENS = (16384, 65536)  # of calibration, at every length
FEW, MIXED = 1024, 8192  # tokens of an expert's few, and of every mix
HELDOUT = {"256 tokens": (32, 256), "2,048 tokens": (16, 2048)}
STARVED = (Set(512, 0.7, 0.0), Set(2048, 0.5, 0.0), Set(9216, 0.7, 0.0))
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is calibrated on, by a draw's seed, [samples, seq_len] int64; and how."""

    tokens: Callable[[int], Tensor]
    way: Way = NOW


def demo(tokens: int, length: int, seed: int) -> Tensor:
    return demo_tokens(tokens // length, seed, length)


def standard() -> dict[str, Tensor]:
    return {name: held_out(*shape) for name, shape in HELDOUT.items()}


def compared(
    settings: Mapping[str, Setting], held: Mapping[str, Tensor], draws: int, about: Row, device: torch.device
) -> Iterator[Row]:
    """A row a setting and held-out set, beside the first setting."""
    source = Checkpoint(Path(TINY.source))
    errors: dict[str, list[list[Tensor]]] = {name: [] for name in settings}
    for seed in range(draws):
        lab: Lab | None = None
        for name, setting in settings.items():
            tokens = setting.tokens(seed)
            if lab is None or not torch.equal(lab.own, tokens):
                lab = Lab(source, tokens, list(held.values()), device)
            errors[name].append([each.errors for each in lab.losses(setting.way)])
    present = next(iter(settings))
    for name, found in errors.items():
        for where, mine, first in zip(held, zip(*found, strict=True), zip(*errors[present], strict=True), strict=True):
            by_draw, before = torch.stack(mine), torch.stack(first)  # [draws, sequences]
            yield {
                **about,
                "setting": name,
                "held_out": where,
                "error": float(by_draw.sum(1).mean()),
                "against_present": ratio(by_draw.mean(0).numpy(), before.mean(0).numpy()).interval().json(),
                "draws": (by_draw.sum(1) / before.sum(1)).tolist(),
            }


def lengths(draws: int, device: torch.device) -> Iterator[Row]:
    for tokens in TOKENS:
        settings = {f"{length} tokens a sample": Setting(partial(demo, tokens, length)) for length in LENGTHS}
        yield from compared(settings, standard(), draws, {"about": "length", "tokens": tokens}, device)


def blends(draws: int, device: torch.device) -> Iterator[Row]:
    for tokens in (FEW, TOKENS[0]):
        settings = {name: Setting(partial(demo, tokens, TINY.seq_len), way) for name, way in BLENDS.items()}
        yield from compared(settings, standard(), draws, {"about": "blend", "tokens": tokens}, device)


def mixes(draws: int, device: torch.device) -> Iterator[Row]:
    held = {"texts": held_out(*HELDOUT["256 tokens"])}
    held |= {kind: calibration_texts.held_back(kind, TINY.seq_len) for kind in calibration_texts.KINDS[1:]}
    shape = MIXED // TINY.seq_len, TINY.seq_len
    settings = {"the calibration file in order": Setting(partial(calibration_texts.as_now, *shape))}
    for name, kinds in calibration_texts.MIXES.items():
        settings[name] = Setting(partial(calibration_texts.mixed, kinds, *shape))
    yield from compared(settings, held, draws, {"about": "mix", "tokens": MIXED}, device)


def wide(_draws: int, device: torch.device) -> Iterator[Row]:
    for each in STARVED:
        made = wide_experts(each, WIDE_EXPERTS, device)
        base: Tensor | None = None
        for name, way in BLENDS.items():
            start = time.perf_counter()
            pair = quantized_experts(made.gate_up, made.down, made.rows, made.common, way, made.limit)
            found = made.errors(pair)
            base = found if base is None else base
            yield {
                **{"about": "blend", "set": asdict(each), "tokens": each.tokens, "setting": name},
                **{"held_out": "random", "error": float(found.mean())},
                "against_present": ratio(found.numpy(), base.numpy()).interval().json(),
                "seconds": time.perf_counter() - start,
            }


PARTS: Mapping[str, Callable[[int, torch.device], Iterator[Row]]] = {"length": lengths, "mix": mixes, "blend": blends}


def tell(row: Row) -> None:
    draws = row.get("draws", [1.0])
    spread = f"draws {100 * (min(draws) - 1):+.1f} to {100 * (max(draws) - 1):+.1f}%"
    text = f"{row['about']:<6} {row['tokens']:>6} {row['setting']:<48} on {row['held_out']:<13} {row['error']:.5f}"
    Console(width=200, highlight=False).print(f"{text} {change(row['against_present'])}, {spread}")


@torch.no_grad()
def main() -> None:
    parser = parser_for("calibration_settings", __doc__)
    parser.prog = "python -m benchmarks.calibration_settings"
    parser.add_argument("--wide", action="store_true", help="blends on random experts of DeepSeek-V4-Flash's widths")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="(default: all)")
    parser.add_argument("--draws", type=int, default=5, help="of the calibration documents (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="gets the figures as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    for part in [wide] if args.wide else [PARTS[name] for name in args.parts]:
        for row in part(args.draws, device):
            rows.append(row)
            tell(row)
    if args.out:
        command = f"python -m benchmarks.calibration_settings {' '.join(sys.argv[1:])}"
        model = "random experts of DeepSeek-V4-Flash's widths" if args.wide else TINY.source
        write_json(args.out, {"command": command, **machine(device), "model": model, "rows": rows})


if __name__ == "__main__":
    run_main(main)
