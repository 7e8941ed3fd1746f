"""Which layers cost quality and draft acceptance, and what a few of them in another form would bring back.

    python -m benchmarks.layer_costs --device cuda --out benchmarks/results/layer-costs-tiny-h200.json

models/tiny is quantized once, layer after layer as calibration does, in every form of benchmarks/mixtures.py. Then it
runs over held-out text with its experts in mixtures of those: the whole artifact, one layer quantized and the others as
in the source, one layer or one expert left as in the source, one layer in a larger form, and the best choices that 2%
more bytes buy, chosen by the first half of the sequences and judged by the second. Each row has KL divergence from the
source, how much of the artifact's it brings back, the same most likely token, and the MTP block's acceptance at every
draft position (v4forge/model/drafts.py) beside the source's, with 95% intervals over sequences. `more_bytes_percent` is
of the files of models/tiny's artifact, and of DeepSeek-V4-Flash's for the same share of its experts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.code_ways import NOW
from benchmarks.lab import TINY, Lab, demo_tokens, held_out
from benchmarks.machine import machine
from benchmarks.mixtures import FLASH_SHARE, FP8, G32, G64, INT4, SOURCE, Mixture, Mixtures, with_experts, with_layer
from scripts.cli import parser_for
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import run_main
from v4forge.files import write_json
from v4forge.intervals import Estimate, Figure, ratio, share
from v4forge.model import evaluation

BUDGET = 2.0  # percent of the artifact's bytes
Row = dict[str, Any]


def minus(a: Figure, b: Figure) -> Figure:
    return a + b.over(-1)


@dataclass
class Table:
    """Rows beside the source and the whole artifact. What a row brings back by itself is also told of the first half
    of the sequences, to choose by; what was chosen so is judged by the second."""

    mixtures: Mixtures
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source = self.mixtures.quality(self.mixtures.even(SOURCE))
        self.whole = self.mixtures.quality(self.mixtures.even(INT4))
        self.half = len(self.mixtures.text) // 2

    def add(self, kind: str, name: str, mixture: Mixture, mtp: str = SOURCE, more: Row | None = None) -> float:
        """-> the KL divergence that the mixture brings back of the whole artifact's, a share, on the first half."""
        found = self.mixtures.quality(mixture, mtp)
        kl, whole = found.kl.nansum(1).numpy(), self.whole.kl.nansum(1).numpy()
        judged = slice(self.half if kind == "best" else 0, None)
        self.rows.append(
            {
                "kind": kind,
                "name": name,
                "more_bytes_percent": more or self.mixtures.more_bytes(mixture),
                "kl": evaluation.mean(found.kl[judged]).interval().json(),
                "kl_brought_back": ratio((whole - kl)[judged], whole[judged]).interval().json(),
                "agreement": evaluation.agreement(found).json(),
                "drafts": [self._draft(found, k) for k in range(self.mixtures.count)],
                "accepted_per_step": found.accepted_per_step(self.mixtures.count).interval().json(),
            }
        )
        tell(self.rows[-1])
        return float((whole - kl)[: self.half].sum() / whole[: self.half].sum())

    def _draft(self, found: evaluation.Quality, k: int) -> Row:
        mine, first = found.acceptance()[k], self.source.acceptance()[k]
        accepted, judged = found.accepted[k].numpy(), found.judged[k].numpy()
        return {
            "position": k + 1,
            "judged": int(judged.sum()),
            "acceptance": share(accepted, judged).json(),
            "against_source": minus(mine, first).interval().json(),
        }


def fill(table: Table) -> None:
    """Every row, the chosen mixtures last: what is chosen is what brought back most by itself."""
    m = table.mixtures
    source, whole = m.even(SOURCE), m.even(INT4)
    layers, count = m.shape
    table.add("whole", "the source", source)
    table.add("whole", "the artifact", whole)
    table.add("whole", "the artifact, its MTP block's experts at INT4, too", whole, INT4)
    table.add("whole", "the source, its MTP block's experts at INT4", source, INT4)
    for form in (G64, G32, FP8):
        table.add("whole", f"all layers at {form}", m.even(form))
    for layer in range(layers):
        table.add("alone", f"layer {layer} at INT4, the others as the source", with_layer(source, layer, INT4))
    for form in (G64, FP8, SOURCE):
        mixture, more = m.hash_routed(form)
        table.add("hash", f"the hash-routed layers at {form}", mixture, more=more)
    gains: dict[str, dict[int, float]] = {}
    for form in (G64, FP8, SOURCE):
        gains[form] = {
            layer: table.add("layer", f"layer {layer} at {form}", with_layer(whole, layer, form))
            for layer in range(layers)
        }
    by_expert = {
        (layer, e): table.add(
            "expert", f"expert {e} of layer {layer} as the source", with_experts(whole, [(layer, e)], SOURCE)
        )
        for layer in range(layers)
        for e in range(count)
    }
    for form in (G64, SOURCE):
        chosen = best(gains[form], affordable(m, form, layers))
        mixture = whole
        for layer in chosen:
            mixture = with_layer(mixture, layer, form)
        table.add("best", f"layers {', '.join(map(str, sorted(chosen)))} at {form}", mixture)
        some = best(by_expert, affordable(m, form, layers * count))
        table.add("best", f"{len(some)} of {layers * count} experts at {form}", with_experts(whole, some, form))
    first = best(by_expert, 1)
    table.add("best", f"1 of {layers * count} experts at {FP8}", with_experts(whole, first, FP8))


def output_errors(lab: Lab) -> list[dict[str, float | None]]:
    """What of its experts' output each layer loses at INT4 g128, behind the source's layers: that a layer costs more
    KL divergence than others can be this, or that the model forgives less there."""
    (found,) = lab.losses(NOW)
    return [ratio(lost, energy).interval().json() for lost, energy in zip(found.lost, found.energy, strict=True)]


def affordable(m: Mixtures, form: str, parts: int) -> int:
    """How many of so many equal parts of the experts BUDGET pays for, of Flash."""
    return int(BUDGET / m.more_bytes(m.even(form))["flash"] * parts)


def best(gains: Mapping[Any, float], number: int) -> list[Any]:
    return sorted(gains, key=lambda each: -gains[each])[:number]


def tell(row: Row) -> None:
    def percent(told: Mapping[str, float | None]) -> str:
        found = Estimate.of(told)
        return f"{100 * found.value:6.2f} ±{50 * (found.high - found.low):5.2f}%"

    columns: Iterator[str] = (
        f"{percent(d['acceptance'])} ({100 * d['against_source']['value']:+.2f})" for d in row["drafts"]
    )
    text = f"{row['name']:<52} +{row['more_bytes_percent']['flash']:5.2f}%  KL {row['kl']['value']:.5f}"
    text += f", back {percent(row['kl_brought_back'])}, same {row['agreement']['value']:.2%}, drafts "
    Console(width=220, highlight=False).print(text + "  ".join(columns))


@torch.no_grad()
def main() -> None:
    parser = parser_for("layer_costs", __doc__)
    parser.prog = "python -m benchmarks.layer_costs"
    parser.add_argument("--samples", type=int, default=TINY.samples, help="calibration samples (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=94, help="of held-out text (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in each (default: %(default)s)")
    parser.add_argument("--drafts", type=int, default=3, help="a position (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="gets the figures as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    source, text = Checkpoint(Path(TINY.source)), held_out(args.sequences, args.seq_len)
    own = demo_tokens(args.samples)
    errors = output_errors(Lab(source, own, [text], device))
    table = Table(Mixtures(Lab(source, own, [], device), text, args.drafts))
    fill(table)
    if args.out:
        command = f"python -m benchmarks.layer_costs {' '.join(sys.argv[1:])}"
        settings = {n: getattr(args, n) for n in ("samples", "sequences", "seq_len", "drafts")}
        about = {"command": command, **machine(device), "model": TINY.source, **settings}
        write_json(
            args.out, {**about, "experts_share": {"flash": FLASH_SHARE}, "output_errors": errors, "rows": table.rows}
        )


if __name__ == "__main__":
    run_main(main)
