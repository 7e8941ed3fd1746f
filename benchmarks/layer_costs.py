"""Which layers cost quality and draft acceptance, and what a few of them in another form would bring back.

    python -m benchmarks.layer_costs --device cuda --out benchmarks/results/layer-costs-tiny-h200.json

models/tiny is quantized once, layer after layer as calibration does, in every form of FORMS. Then it runs over held-out
text with its experts in mixtures of those: the whole artifact, one layer quantized and the others as in the source, one
layer or one expert left as in the source, one layer in a larger form, and the best choices that 2% more bytes buy,
chosen by the first half of the sequences and judged by the second. Each row has KL divergence from the source, how much
of the artifact's it brings back, the same most likely token, and the MTP block's acceptance at every draft position
(v4forge/model/drafts.py) beside the source's, with 95% intervals over sequences. `more_bytes_percent` is of the files
of models/tiny's artifact, and of DeepSeek-V4-Flash's for the same share of its experts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.code_ways import NOW, Pair, groups_of, quantized_experts
from benchmarks.lab import AT_ONCE, TINY, Lab, demo_tokens, held_out
from benchmarks.machine import machine
from scripts.cli import parser_for
from v4forge.checkpoint import layout
from v4forge.checkpoint.codec import decode_fp8, encode_fp8
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import run_main
from v4forge.files import write_json
from v4forge.intervals import Estimate, Figure, ratio, share
from v4forge.model import deepseek_v4, drafts, evaluation
from v4forge.model.mtp import load_mtp
from v4forge.pipeline.requirements import flash_config
from v4forge.quantization import experts, gptq

INT4, G64, G32, FP8, SOURCE = "int4 g128", "int4 g64", "int4 g32", "fp8", "source"
# Bits a weight: INT4 with a BF16 scale a group, FP8 with an F32 scale a block of 128x128, the source's FP4 with an E8M0
# scale a group of 32. In BF16 the source's values are the same.
FORMS = {INT4: 4 + 16 / 128, G64: 4 + 16 / 64, G32: 4 + 16 / 32, FP8: 8 + 32 / 128**2, SOURCE: 4 + 8 / 32}
BUDGET = 2.0  # percent of the artifact's bytes
Mixture = tuple[tuple[str, ...], ...]  # the form of each expert, layer by layer
Row = dict[str, Any]


def experts_share(config: layout.Config) -> float:
    """The routed experts' part of an artifact's bytes."""
    specs = layout.artifact(config)
    return sum(s.bytes for n, s in specs.items() if n.startswith("layers.") and ".ffn.experts." in n) / sum(
        s.bytes for s in specs.values()
    )


@dataclass
class Mixtures:
    """A model with its experts in any mixture of forms, over held-out tokens. lab: for what they are calibrated on."""

    lab: Lab
    text: Tensor  # [sequences, tokens] int64
    count: int  # drafts a position
    forms: list[dict[str, Pair]] = field(default_factory=list)  # of each layer
    _kept: dict[Mixture, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for own, attended, made in self.lab.layers(NOW):
            assert made is not None, "a way was given"
            self.forms.append({INT4: made, SOURCE: (own.gate_up_proj, own.down_proj)} | self._others(own, attended))
        c = self.lab.source.config
        self.layers = [deepseek_v4.load_layer(self.lab.weights, self.lab.hf_config, i, experts=False) for i in c.layers]
        self.mtps = {SOURCE: load_mtp(self.lab.weights, self.lab.hf_config)}
        self.mtps[INT4] = load_mtp(self.lab.weights, self.lab.hf_config, self._mtp_int4())
        self.texts = self.text.to(self.lab.device).split(max(1, AT_ONCE // self.text.shape[1]))
        self.shape = len(c.layers), c.n_routed_experts
        self.limit = float(self.lab.hf_config.swiglu_limit)

    def _others(self, own: Any, attended: Sequence[deepseek_v4.Attended]) -> dict[str, Pair]:
        found: dict[str, Pair] = {}
        for form, size in ((G64, 64), (G32, 32)):
            with groups_of(size, self.lab.device):
                found[form] = self.lab.quantized(own, attended, NOW)
        both = (own.gate_up_proj, own.down_proj)
        gate_up, down = (torch.stack([decode_fp8(**encode_fp8(w)) for w in each]) for each in both)
        return found | {FP8: (gate_up, down)}

    def _mtp_int4(self) -> Pair:
        """The MTP block's experts at INT4, by the calibration tokens behind the quantized layers."""
        lab, mtp = self.lab, self.mtps[SOURCE]
        attended = []
        for streams, tokens in zip(lab.streams, lab.batches, strict=True):
            following = tokens[:, 1:]
            context = lab.rotary.context(following)
            embeds = torch.nn.functional.embedding(following, lab.root.embed)
            mixed = mtp.h_proj(mtp.hnorm(streams[:, :-1])) + mtp.e_proj(mtp.enorm(embeds)).unsqueeze(2)
            attended.append(deepseek_v4.attend(mtp.block, mixed, context))
        x, indices = (torch.cat([getattr(each, name) for each in attended]) for name in ("x", "indices"))
        own = mtp.block.mlp.experts
        rows = [x[(indices == e).any(1)] for e in range(len(own.gate_up_proj))]
        stride = max(1, len(x) // (experts.SAMPLE_FACTOR * own.down_proj.shape[-1]))
        common = experts.Common(gptq.gram(x) / len(x), x[::stride])
        return quantized_experts(own.gate_up_proj, own.down_proj, rows, common, NOW, float(own.limit))

    def even(self, form: str) -> Mixture:
        layers, count = self.shape
        return ((form,) * count,) * layers

    def pair(self, layer: int, forms: tuple[str, ...]) -> Pair:
        of = self.forms[layer]
        if len(set(forms)) == 1:
            return of[forms[0]]
        gate_up, down = (torch.stack([of[form][part][e] for e, form in enumerate(forms)]) for part in (0, 1))
        return gate_up, down

    def streams(self, mixture: Mixture) -> list[Tensor]:
        """Behind the last of the mixture's layers, one a batch. What even beginnings make is kept."""
        if mixture in self._kept:
            return self._kept[mixture]
        if not mixture:
            return [deepseek_v4.embed(self.lab.root, self.lab.hf_config, text) for text in self.texts]
        index = len(mixture) - 1
        gate_up, down = self.pair(index, mixture[-1])
        found = []
        for text, each in zip(self.texts, self.streams(mixture[:-1]), strict=True):
            attended = deepseek_v4.attend(self.layers[index], each, self.lab.rotary.context(text))
            routed = deepseek_v4.routed_experts(attended, gate_up, down, self.limit)
            found.append(deepseek_v4.combine(attended, routed))
        if len({form for layer in mixture for form in layer}) == 1:
            self._kept[mixture] = found
        return found

    def quality(self, mixture: Mixture, mtp: str = SOURCE) -> evaluation.Quality:
        """Beside the source; nll is not made."""
        root = self.lab.root
        made = evaluation.Quality.blank(len(self.text), self.text.shape[1] - 1, self.count)
        start = 0  # of the rows
        for tokens, exact, each in zip(self.texts, self.streams(self.even(SOURCE)), self.streams(mixture), strict=True):
            log_p, log_q = (root.final(s, root.head).double().log_softmax(-1) for s in (exact, each))
            choices = log_q.argmax(-1)
            rows = slice(start, start + len(tokens))
            start += len(tokens)
            made.kl[rows] = evaluation.divergence(log_p, log_q)[:, :-1].cpu()
            made.agrees[rows] = (log_p.argmax(-1) == choices)[:, :-1].double().cpu()
            proposed, _ = drafts.propose(self.mtps[mtp], root, self.lab.rotary, each, tokens, self.count)
            counts = drafts.judge(proposed, choices, tokens)
            made.judged[:, rows], made.accepted[:, rows] = counts.judged.cpu(), counts.accepted.cpu()
        return made

    def more_bytes(self, mixture: Mixture) -> dict[str, float]:
        """Percent more than with all experts at INT4 g128, of models/tiny and of Flash with the same share of each."""
        chosen = [FORMS[form] for layer in mixture for form in layer]
        grown = sum(chosen) / len(chosen) / FORMS[INT4] - 1
        return {"tiny": 100 * grown * experts_share(self.lab.source.config), "flash": 100 * grown * FLASH_SHARE}

    def hash_routed(self, form: str) -> tuple[Mixture, dict[str, float]]:
        """The artifact with its first, hash-routed layers in a form; and its bytes, Flash's with as many as it has."""
        mixture = self.even(INT4)
        for layer in range(self.lab.source.config.num_hash_layers):
            mixture = with_layer(mixture, layer, form)
        part = FLASH.num_hash_layers / FLASH.num_hidden_layers
        return mixture, self.more_bytes(mixture) | {"flash": part * self.more_bytes(self.even(form))["flash"]}


FLASH = flash_config()
FLASH_SHARE = experts_share(FLASH)


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


def with_layer(mixture: Mixture, layer: int, form: str) -> Mixture:
    return tuple((form,) * len(forms) if i == layer else forms for i, forms in enumerate(mixture))


def with_experts(mixture: Mixture, chosen: Sequence[tuple[int, int]], form: str) -> Mixture:
    return tuple(
        tuple(form if (i, e) in chosen else old for e, old in enumerate(forms)) for i, forms in enumerate(mixture)
    )


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
