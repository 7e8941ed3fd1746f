"""How far our forward pass, in BF16 but for what upstream has in F32, is from the same pass in F32 throughout.

python tests/model/test_precision.py prints it for 48 sequences.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from synthetic import config_dict
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import deepseek_v4, heldout
from v4forge.model.evaluation import divergence
from v4forge.model.layer_classes import hf

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
SEQUENCES, SEQ_LEN = 12, 300
CALM = 0.99  # share of the tokens, without those of which a layer's experts are others: these have most of the mean


@dataclass(frozen=True)
class Distance:
    """From the F32 pass, over all tokens: KL in nats, [sequences, seq] f64, and the share of equal likeliest tokens."""

    kl: Tensor
    agreement: float

    @property
    def mean(self) -> float:
        return float(self.kl.mean())

    @property
    def calm_mean(self) -> float:
        """Of the tokens that are nearest."""
        nearest = self.kl.flatten().sort().values
        return float(nearest[: int(CALM * len(nearest))].mean())


@torch.no_grad()
def logits(checkpoint: Checkpoint, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens: [sequences, seq] -> [sequences, seq, vocab] f32, of a pass whose compute dtype is `dtype`."""
    config, weights = deepseek_v4.hf_config(checkpoint.config), deepseek_v4.Weights(checkpoint, CPU, dtype)
    root, context = deepseek_v4.load_root(weights, config), deepseek_v4.Rotary(config, CPU, dtype).context(tokens)
    streams = deepseek_v4.embed(root, config, tokens)
    for index in checkpoint.config.layers:
        streams = deepseek_v4.run_layer(deepseek_v4.load_layer(weights, config, index), streams, context)
    return root.final(streams, root.head)


def measured(sequences: int) -> Distance:
    checkpoint = Checkpoint(TINY)
    tokens = heldout.tokens(TINY, TINY / "heldout.txt", sequences, SEQ_LEN, checkpoint.config.vocab_size)
    exact, ours = (logits(checkpoint, tokens, dtype) for dtype in (torch.float32, torch.bfloat16))
    kl = divergence(*(each.double().log_softmax(-1) for each in (exact, ours)))
    return Distance(kl, float((exact.argmax(-1) == ours.argmax(-1)).double().mean()))


def test_our_forward_is_as_near_to_the_f32_reference_as_the_docs_say() -> None:
    found = measured(SEQUENCES)
    assert found.mean < 0.002
    assert found.calm_mean < 0.00025
    assert found.agreement > 0.985


@pytest.mark.parametrize("router", ["learned", "hash"])
def test_experts_and_weights_are_those_of_the_scores_in_float64(router: str) -> None:
    """256 experts, top 6, as DeepSeek-V4-Flash has them. Of logits in BF16 every tenth token gets others."""
    raw = config_dict(n_routed_experts=256, num_experts_per_tok=6, hidden_size=1024)
    config = deepseek_v4.hf_config(layout.parse_config(raw, "config.json"))
    index = config.mlp_layer_types.index("hash_moe" if router == "hash" else "moe")
    generator = torch.Generator().manual_seed(2)
    mlp = hf.DeepseekV4SparseMoeBlock(config, index)
    weight = (torch.randn(256, 1024, generator=generator) / 32).bfloat16()
    mlp.gate.weight.data = weight
    x = torch.randn(2, 500, 1024, generator=generator).bfloat16()
    ids = torch.randint(config.vocab_size, (2, 500), generator=generator)
    scores = torch.nn.functional.softplus(x.flatten(0, 1).double() @ weight.double().T).sqrt()
    if router == "hash":
        mlp.gate.tid2eid.copy_(torch.rand(config.vocab_size, 256, generator=generator).topk(6).indices)
        wanted = mlp.gate.tid2eid[ids.flatten()]
    else:
        mlp.gate.e_score_correction_bias.copy_(0.1 * torch.randn(256, generator=generator))
        wanted = (scores + mlp.gate.e_score_correction_bias).topk(6).indices
    weights, indices = deepseek_v4.route(mlp, x, ids)
    assert bool((indices.sort(-1).values == wanted.sort(-1).values).all())
    chosen = scores.gather(1, indices)
    torch.testing.assert_close(
        weights.double(), config.routed_scaling_factor * chosen / chosen.sum(1, keepdim=True), rtol=1e-5, atol=0
    )
    assert mlp.gate.weight.dtype == torch.bfloat16


def main() -> int:
    found = measured(48)
    each = found.kl.mean(1)
    error = float(each.std() / len(each) ** 0.5)
    print(f"{found.kl.numel()} tokens: KL {found.mean:.5f} nats, standard error {error:.5f}")
    print(f"median {float(found.kl.median()):.6f}, mean of the nearest {CALM:.0%} {found.calm_mean:.6f}")
    print(f"most likely token the same: {found.agreement:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
