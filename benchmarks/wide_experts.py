"""Random routed experts of DeepSeek-V4-Flash's widths and their inputs, for benchmarks/codes.py: what models/tiny is
too even for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.code_ways import Pair
from v4forge.checkpoint import codec
from v4forge.model import deepseek_v4
from v4forge.quantization import experts, gptq

HIDDEN, INNER, LIMIT = 4096, 2048, 10.0
HELDOUT = 1024  # tokens an expert
DIFFER = 0.3  # the spread of an input's size from expert to expert, as its logarithm


@dataclass(frozen=True)
class Set:
    """tokens: of each expert; spectrum: the eigenvalues of the inputs' covariance fall as i^(-2 spectrum); tails: the
    spread of single weights, as a logarithm beside a normal one."""

    tokens: int
    spectrum: float
    tails: float


# An expert of Flash sees 9,216 of 768 x 512 tokens on the average.
SETS = (Set(2048, 0.5, 0.0), Set(9216, 0.5, 0.6), Set(9216, 0.7, 0.0), Set(9216, 1.0, 0.0), Set(40000, 0.5, 0.6))


@dataclass(frozen=True)
class Experts:
    gate_up: Tensor  # [E, 2 * inner, hidden] bf16
    down: Tensor  # [E, hidden, inner] bf16
    rows: list[Tensor]  # calibration tokens of each, [n, hidden] bf16
    held: list[Tensor]  # held-out ones
    common: experts.Common
    limit: float = LIMIT

    def errors(self, pair: Pair) -> Tensor:
        """What of its output's energy every held-out token loses, relative to its expert's mean: [tokens] f64."""
        found = []
        for e, x in enumerate(self.held):
            exact, served = (
                deepseek_v4.expert(x.float(), gate_up[e].float(), down[e].float(), LIMIT)
                for gate_up, down in ((self.gate_up, self.down), pair)
            )
            found.append((served - exact).square().sum(1) / exact.square().sum(1).mean())
        return torch.cat(found).double().cpu()


def wide_experts(of: Set, count: int, device: torch.device) -> Experts:
    """`count` experts, whose inputs have one covariance, each input of each expert another size."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    basis, _ = torch.linalg.qr(normal(HIDDEN, HIDDEN))
    sizes = torch.arange(1, HIDDEN + 1, device=device).float().pow(-of.spectrum)
    channels = torch.exp(0.7 * normal(HIDDEN))

    def inputs(rows: int, own: Tensor) -> Tensor:
        x = (normal(rows, HIDDEN) * sizes) @ basis.mT * channels * own
        return F.normalize(x, dim=1).mul_(HIDDEN**0.5).to(torch.bfloat16)

    def weights(rows: int, width: int) -> Tensor:
        made = []
        for _ in range(count):
            w = normal(rows, width) * torch.exp(of.tails * normal(rows, width))
            w *= torch.exp(0.3 * normal(rows, 1) + 0.4 * normal(1, width)) / width**0.5
            stored = codec.encode_fp4(w)
            made.append(codec.decode_fp4(stored["weight"], stored["scale"]))
        return torch.stack(made)

    own = [torch.exp(DIFFER * normal(HIDDEN)) for _ in range(count)]
    rows = [inputs(max(of.tokens, HIDDEN), each) for each in own]
    everything = torch.cat([x[:HIDDEN] for x in rows])
    common = experts.Common(gptq.gram(everything) / len(everything), everything[::count].contiguous())
    return Experts(
        weights(2 * INNER, HIDDEN),
        weights(HIDDEN, INNER),
        [x[: of.tokens] for x in rows],
        [inputs(HELDOUT, each) for each in own],
        common,
    )
