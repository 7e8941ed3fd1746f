"""What the programs that rank ways to quantize the routed experts share: the model's layers over calibration tokens and
held-out ones, and what a way loses there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.code_ways import Pair, Way, quantized_experts
from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import corpus, deepseek_v4, heldout
from v4forge.pipeline.stages import PROFILES
from v4forge.quantization import experts, gptq

TINY = PROFILES["tiny"]
AT_ONCE = 4096  # tokens of a forward pass


@dataclass(frozen=True)
class Lost:
    """What the experts' weighted outputs lose of their energy: both [layers, sequences] f64."""

    lost: Tensor
    energy: Tensor

    @property
    def errors(self) -> Tensor:
        """[sequences] f64: each sequence's part of the relative error, the mean over layers. They sum to the error."""
        return (self.lost / self.energy.sum(1, keepdim=True)).mean(0)


@dataclass
class Lab:
    """The model's layers with the calibration tokens `own`, [samples, seq_len] int64, and then with sets of held-out
    ones, each [sequences, tokens]."""

    source: Checkpoint
    own: Tensor
    held: Sequence[Tensor]
    device: torch.device

    def __post_init__(self) -> None:
        texts = [self.own, *self.held]
        self.batches = [part.to(self.device) for text in texts for part in text.split(max(1, AT_ONCE // text.shape[1]))]
        self.calibration = self.own.numel()
        self.hf_config = deepseek_v4.hf_config(self.source.config)
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

    def losses(self, way: Way) -> list[Lost]:
        """What a way loses on every held-out set, of layers whose inputs are the source's."""
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.held]
        for own, attended, _ in self.states:
            made = self.quantized(own, attended, way)
            parts = [torch.cat([getattr(each, n) for each in attended]) for n in ("x", "indices", "weights")]
            start = self.calibration
            for text, column in zip(self.held, found, strict=True):
                x, indices, weights = (part[start : start + text.numel()] for part in parts)
                start += text.numel()
                held = deepseek_v4.Attended(x, indices, weights, *([x] * 3))
                exact, served = (
                    deepseek_v4.routed_experts(held, pair[0], pair[1], own.limit).float()
                    for pair in ((own.gate_up_proj, own.down_proj), made)
                )
                both = ((served - exact).square().sum(1), exact.square().sum(1))
                column.append(tuple(each.view(text.shape).sum(1).double().cpu() for each in both))  # type: ignore[arg-type]
        return [Lost(*(torch.stack(each) for each in zip(*column, strict=True))) for column in found]

    def errors(self, way: Way) -> Tensor:
        """[sequences] f64 of the first held-out set."""
        return self.losses(way)[0].errors

    @property
    def states(self) -> list[tuple[Any, list[deepseek_v4.Attended], Pair | None]]:
        if not hasattr(self, "_states"):
            self._states = list(self.layers(None))
        return self._states

    def logits(self, way: Way | None) -> Tensor:
        """Log-probabilities of the first held-out set behind all layers, [sequences, tokens, vocab] f32."""
        for _ in self.layers(way):
            pass
        start, held = self.calibration, self.held[0]
        streams = torch.cat([each.flatten(0, 1) for each in self.streams])[start : start + held.numel()]
        return self.root.final(streams.unsqueeze(0), self.root.head)[0].log_softmax(-1).view(*held.shape, -1)


def demo_tokens(samples: int, seed: int = 0, seq_len: int = TINY.seq_len) -> Tensor:
    """Calibration tokens as `make demo` takes them, [samples, seq_len] int64."""
    source = Path(TINY.source)
    return corpus.load(source, Path(TINY.corpus), samples, seq_len, seed, Checkpoint(source).config.vocab_size).tokens


def held_out(sequences: int, tokens: int) -> Tensor:
    """The first of models/tiny's held-out tokens, [sequences, tokens] int64."""
    source = Path(TINY.source)
    return heldout.tokens(source, Path(TINY.heldout), sequences, tokens, Checkpoint(source).config.vocab_size)
