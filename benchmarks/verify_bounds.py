"""Measures verify's statistics on honest output of hard matrices, and how often a good Flash would leave its bounds.

    python -m benchmarks.verify_bounds --out benchmarks/results/verify-bounds-cpu.json --sizes 20 512 128 5
    python -m benchmarks.verify_bounds --out benchmarks/results/verify-bounds-h200.json --device cuda

Experts of every kind of WEIGHTS are quantized by the project's own GPTQ on every kind of INPUTS, with many tokens and
starved. Slopes are told as |ln|, so that half and twice are alike. verify_chances.py continues their tails. On a CPU
matrices are narrow, which is harder, since a group is a larger part of a row; it takes two minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.verify_chances import BOUNDS, COLUMNS, GROUPS, HIDDEN, INNER, MATRICES, MEANS, ROWS, described, worst
from scripts.cli import parser_for
from v4forge.checkpoint import codec
from v4forge.errors import run_main
from v4forge.files import write_json
from v4forge.profiling import Watch
from v4forge.quantization import experts, gptq
from v4forge.quantization.layer_files import Settings
from v4forge.verification import tolerances

GROUP = 128
LARGEST = 1000  # values that a tail is fitted to, at most a quarter of all
LIMIT = 10.0  # of an expert's activation, as Flash's swiglu_limit
DRIFT = 2.0**-8  # relative, of inputs on other hardware: a BF16 rounding each
LEAST_SLOPE, TINY = 1e-3, 1e-30
WIDE = 4  # groups of a row, at least, to say something of Flash's, which have 16 and 32
LARGE = 0.25  # share of its row's squared norm that makes a group a large one

Draw = Callable[..., Tensor]
Sizes = tuple[int, int, int, int]  # experts at a time, hidden, inner, how many times


def lognormal_groups(*shape: int) -> Tensor:
    *rows, width = shape
    return torch.randn(shape) * torch.randn(*rows, width // GROUP).exp().repeat_interleave(GROUP, -1)


def student_t(*shape: int) -> Tensor:
    return torch.randn(shape) / torch.randn(3, *shape).square().mean(0).sqrt()


def faint_group(*shape: int) -> Tensor:
    """One group of every row at 1/32 of the others."""
    weights = torch.randn(shape).unflatten(-1, (-1, GROUP))
    faint = torch.randint(weights.shape[-2], weights.shape[:-2]).unsqueeze(-1)
    chosen = torch.arange(weights.shape[-2]) == faint
    return torch.where(chosen.unsqueeze(-1), weights / 32, weights).flatten(-2)


WEIGHTS: dict[str, Draw] = {
    "normal": lambda *shape: torch.randn(shape),
    "lognormal groups": lognormal_groups,
    "student t of 3 degrees": student_t,
    "one group at 1/32": faint_group,
    "columns of lognormal sizes": lambda *shape: torch.randn(shape) * torch.randn(shape[0], 1, shape[2]).exp(),
}


def low_rank(width: int) -> Draw:
    """Inputs that lie near a 32nd of the dimensions."""
    mixing = torch.randn(width // 32, width) / (width // 32) ** 0.5
    return lambda count: torch.randn(count, width // 32) @ mixing + 0.1 * torch.randn(count, width)


def massive(width: int) -> Draw:
    """Correlated inputs of lognormal sizes, a hundredth of which are 100 times as large."""
    mixing = torch.eye(width) + torch.randn(width, width) / width**0.5
    sizes = torch.randn(width).exp() * torch.where(torch.rand(width) < 0.01, 100.0, 1.0)
    return lambda count: (torch.randn(count, width) @ mixing) * sizes


INPUTS: dict[str, Callable[[int], Draw]] = {
    "white": lambda width: lambda count: torch.randn(count, width),
    "low rank": low_rank,
    "massive": massive,
}
TOKENS = {"many": 4.0, "starved": 1 / 64}  # of an expert, in widths of its input


def source(draw: Draw, *shape: int) -> Tensor:
    """Weights that FP4 holds, as upstream's are: [E, out, in] bf16."""
    weights = draw(*shape) / shape[-1] ** 0.5
    parts = codec.encode_fp4(weights.flatten(0, 1))
    return codec.decode_fp4(parts["weight"], parts["scale"]).view(shape).bfloat16()


def statistics(weights: Tensor, found: gptq.Quantized) -> dict[str, Tensor]:
    """Of the matrices [E, out, in], as reference.py defines them, from values; slopes as |ln|, all flat."""
    w = weights.float().unflatten(-1, (-1, GROUP))
    step = found.scale.float().unsqueeze(-1)
    q = found.codes.float().unflatten(-1, (-1, GROUP)) * step
    slopes, norm = (q * w).sum(-1) / w.square().sum(-1).clamp(min=TINY), w.square().sum(-1).sqrt()
    counted = norm.sum(1) >= tolerances.COLUMN_SHARE * norm.sum(1).mean(1, keepdim=True)
    nearest = (w / step).round_().clamp_(-8, 7) * step
    return {
        "errors": ((q - w).square().sum((1, 2, 3)) / w.square().sum((1, 2, 3))).sqrt(),
        "moved": (nearest != q).float().mean((1, 2, 3)),
        "rows": logarithm((slopes * norm).sum(2) / norm.sum(2)),
        "columns": logarithm(((slopes * norm).sum(1) / norm.sum(1))[counted]),
        "groups": logarithm(slopes),
        "large groups": logarithm(slopes[norm.square() >= LARGE * norm.square().sum(2, keepdim=True)]),
    }


def logarithm(slopes: Tensor) -> Tensor:
    return slopes.clamp(min=LEAST_SLOPE).log().abs().flatten()


class Kept:
    """The statistics of one kind: how many, and of slopes the largest."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}
        self.values: dict[str, Tensor] = {}

    def add(self, found: Mapping[str, Tensor]) -> None:
        for name, values in found.items():
            self.count[name] = self.count.get(name, 0) + len(values)
            both = torch.cat((self.values.get(name, torch.empty(0, device="cpu")), values.float().cpu()))
            kept = len(both) if name in MEANS else min(len(both), LARGEST + 1)
            self.values[name] = both.topk(kept).values


def measured(weights: Draw, inputs: Callable[[int], Draw], widths: float, sizes: Sizes) -> Kept:
    """Experts of one kind, quantized; the first ones once more from inputs that other hardware would have had."""
    kept, (count, hidden, inner, batches) = Kept(), sizes
    for _ in range(batches):
        draw = inputs(hidden)
        everything = draw(4 * hidden).bfloat16()
        common = experts.Common(gptq.gram(everything) / len(everything), everything[: experts.SAMPLE_FACTOR * inner])
        gate_up, down = source(weights, count, 2 * inner, hidden), source(weights, count, hidden, inner)
        rows = [draw(int(widths * hidden)).bfloat16() for _ in range(count)]
        one = quantized(rows, gate_up, down, common)
        moved = []
        for which, w, q in (("w1, w3", gate_up, one.gate_up), ("w2", down, one.down)):
            found = statistics(w, q)
            kept.add({f"errors {which}": found.pop("errors")})
            moved.append(found.pop("moved"))
            if q.scale.shape[2] < WIDE:
                del found["rows"]
            kept.add(found)
        if "equal" not in kept.count:
            drifted = [(x * (1 + DRIFT * torch.randn(x.shape))).bfloat16() for x in rows]
            other = quantized(drifted, gate_up, down, common)
            both = ("gate_up", "down")
            equal = [(getattr(one, k).codes == getattr(other, k).codes).float().mean((1, 2)) for k in both]
            lost = [sum(sum(by["gptq"]) for by in each.error.values()) for each in (one, other)]
            kept.add({"equal": by_expert(equal), "loss off": torch.tensor([lost[1] / lost[0] - 1])})
        kept.add({"moved": by_expert(moved)})
    return kept


def quantized(rows: Sequence[Tensor], gate_up: Tensor, down: Tensor, common: experts.Common) -> experts.Experts:
    h = experts.hessians(rows, gate_up, LIMIT, common, range(len(rows)))
    return experts.quantize(gate_up, down, h, Settings(), range(len(rows)), Watch(down.device))


def by_expert(both: list[Tensor]) -> Tensor:
    """Of [gate_up, down], shares of their codes -> of all: gate_up has twice as many."""
    return (2 * both[0] + both[1]) / 3


SIZES: dict[str, Sizes] = {"cpu": (10, 512, 128, 5), "cuda": (8, HIDDEN, INNER, 8)}


@torch.no_grad()
def main() -> None:
    parser = parser_for("verify_bounds", __doc__)
    parser.prog = "python -m benchmarks.verify_bounds"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets every number as JSON")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--sizes", type=int, nargs=4, metavar="N", help="experts at a time, hidden, inner, repeats")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_default_device(device)
    torch.manual_seed(args.seed)
    sizes = tuple(args.sizes or SIZES[device.type])
    kinds = {}
    for (weights, draw), (inputs, of), (tokens, widths) in product(WEIGHTS.items(), INPUTS.items(), TOKENS.items()):
        name = f"{weights}; {inputs} inputs, {tokens} tokens"
        kept = measured(draw, of, widths, sizes)
        kinds[name] = described(kept.values, kept.count)
        figures = {of: f"{value:.3g}" for of, value in kinds[name]["greatest"].items()}
        print(name, figures, kinds[name]["chance"], file=sys.stderr, flush=True)
    counts = {"matrices": MATRICES, "rows": ROWS, "columns of groups": COLUMNS, "groups": GROUPS}
    groups = sum(kind["count"]["groups"] for kind in kinds.values())
    found = {
        "bounds": BOUNDS,
        "flash": counts,
        "sizes": sizes,
        "groups": groups,
        "worst_chance": worst(kinds.values()),
        "kinds": kinds,
    }
    command = " ".join(["python -m benchmarks.verify_bounds", *sys.argv[1:]])
    write_json(args.out, {"command": command, **machine(device), **found})


if __name__ == "__main__":
    run_main(main)
