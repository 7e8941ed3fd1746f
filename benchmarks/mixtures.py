"""models/tiny's experts in several forms, and the model with any mixture of them over held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.code_ways import NOW, Pair, groups_of, quantized_experts
from benchmarks.lab import AT_ONCE, Lab
from v4forge.checkpoint import layout
from v4forge.checkpoint.codec import decode_fp8, encode_fp8
from v4forge.model import deepseek_v4, drafts, evaluation
from v4forge.model.mtp import load_mtp
from v4forge.pipeline.requirements import flash_config
from v4forge.quantization import experts, gptq

INT4, G64, G32, FP8, SOURCE = "int4 g128", "int4 g64", "int4 g32", "fp8", "source"
# Bits a weight: INT4 with a BF16 scale a group, FP8 with an F32 scale a block of 128x128, the source's FP4 with an E8M0
# scale a group of 32. In BF16 the source's values are the same.
FORMS = {INT4: 4 + 16 / 128, G64: 4 + 16 / 64, G32: 4 + 16 / 32, FP8: 8 + 32 / 128**2, SOURCE: 4 + 8 / 32}
Mixture = tuple[tuple[str, ...], ...]  # the form of each expert, layer by layer


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


def with_layer(mixture: Mixture, layer: int, form: str) -> Mixture:
    return tuple((form,) * len(forms) if i == layer else forms for i, forms in enumerate(mixture))


def with_experts(mixture: Mixture, chosen: Sequence[tuple[int, int]], form: str) -> Mixture:
    return tuple(
        tuple(form if (i, e) in chosen else old for e, old in enumerate(forms)) for i, forms in enumerate(mixture)
    )
