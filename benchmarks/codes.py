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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.code_ways import DEFAULT, WAYS, Pair, Way, quantized_experts
from benchmarks.machine import machine
from benchmarks.wide_experts import SETS, wide_experts
from scripts.cli import parser_for
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError, run_main
from v4forge.files import write_json
from v4forge.intervals import Estimate, ratio, share
from v4forge.model import corpus, deepseek_v4, heldout
from v4forge.pipeline.stages import PROFILES
from v4forge.quantization import experts, gptq

TINY = PROFILES["tiny"]
HELDOUT = 32, 256  # sequences, and tokens in each
AT_ONCE = 16  # sequences of a forward pass
WIDE_EXPERTS = 4  # of a set of --wide


@dataclass
class Lab:
    """The model's layers with the tokens of the corpus and then of the held-out text."""

    source: Checkpoint
    samples: int
    device: torch.device

    def __post_init__(self) -> None:
        config = self.source.config
        folder = self.source.directory
        own = corpus.load(folder, Path(TINY.corpus), self.samples, TINY.seq_len, 0, config.vocab_size).tokens
        held = heldout.tokens(folder, Path(TINY.heldout), *HELDOUT, config.vocab_size)
        self.batches = torch.cat((own, held)).to(self.device).split(AT_ONCE)
        self.calibration = own.numel()
        self.hf_config = deepseek_v4.hf_config(config)
        self.weights = deepseek_v4.Weights(self.source, self.device)
        self.root = deepseek_v4.load_root(self.weights, self.hf_config)
        self.rotary = deepseek_v4.Rotary(self.hf_config, self.device, self.weights.dtype)

    def layers(self, way: Way | None) -> Iterator[tuple[Any, list[deepseek_v4.Attended], Pair | None]]:
        """Each layer's experts, what enters them, and what `way` makes of them, with which the next layer goes on."""
        streams = [deepseek_v4.embed(self.root, self.hf_config, batch) for batch in self.batches]
        for index in self.source.config.layers:
            layer = deepseek_v4.load_layer(self.weights, self.hf_config, index)
            attended = [
                deepseek_v4.attend(layer, each, self.rotary.context(batch))
                for each, batch in zip(streams, self.batches, strict=True)
            ]
            own = layer.mlp.experts
            made = None if way is None else self.quantized(own, attended, way)
            served = made or (own.gate_up_proj, own.down_proj)
            streams = [
                deepseek_v4.combine(each, deepseek_v4.routed_experts(each, served[0], served[1], own.limit))
                for each in attended
            ]
            yield own, attended, made
        self.streams = streams

    def quantized(self, own: Any, attended: Sequence[deepseek_v4.Attended], way: Way) -> Pair:
        """The layer's experts, by the calibration tokens."""
        x = torch.cat([each.x for each in attended])[: self.calibration]
        indices = torch.cat([each.indices for each in attended])[: self.calibration]
        rows = [x[(indices == e).any(1)] for e in range(len(own.gate_up_proj))]
        stride = max(1, len(x) // (experts.SAMPLE_FACTOR * own.down_proj.shape[-1]))
        common = experts.Common(gptq.gram(x) / len(x), x[::stride])
        return quantized_experts(own.gate_up_proj, own.down_proj, rows, common, way, float(own.limit))

    def errors(self, way: Way) -> torch.Tensor:
        """[sequences] f64: what of the outputs' energy a way loses on each held-out sequence, the mean over layers."""
        found = []
        for own, attended, _ in self.states:
            made = self.quantized(own, attended, way)
            x, indices, weights = (
                torch.cat([getattr(each, name) for each in attended])[self.calibration :]
                for name in ("x", "indices", "weights")
            )
            held = deepseek_v4.Attended(x, indices, weights, *([x] * 3))
            exact, served = (
                deepseek_v4.routed_experts(held, pair[0], pair[1], own.limit).float()
                for pair in ((own.gate_up_proj, own.down_proj), made)
            )
            lost = (served - exact).square().sum(1).view(HELDOUT).sum(1)
            found.append((lost / exact.square().sum()).double().cpu())
        return torch.stack(found).mean(0)

    @property
    def states(self) -> list[tuple[Any, list[deepseek_v4.Attended], Pair | None]]:
        if not hasattr(self, "_states"):
            self._states = list(self.layers(None))
        return self._states

    def logits(self, way: Way | None) -> torch.Tensor:
        """Log-probabilities of the held-out tokens behind all layers, [sequences, tokens, vocab] f32."""
        for _ in self.layers(way):
            pass
        found = [self.root.final(each, self.root.head).log_softmax(-1) for each in self.streams]
        return torch.cat(found)[-HELDOUT[0] :]


@torch.no_grad()
def tiny(names: Sequence[str], samples: int, device: torch.device, kl: bool) -> list[dict[str, Any]]:
    lab = Lab(Checkpoint(Path(TINY.source)), samples, device)
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
