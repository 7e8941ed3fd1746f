"""How far our forward pass, in BF16 but for what upstream has in F32, is from the same pass in F32 throughout.

`python -m benchmarks.precision` prints it for 48 sequences.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import config_dict

from benchmarks.precision import Distance, log_probabilities
from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import deepseek_v4, heldout
from v4forge.model.layer_classes import hf

CPU = torch.device("cpu")
TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
SEQUENCES, SEQ_LEN = 12, 300


def test_our_forward_is_as_near_to_the_f32_reference_as_the_docs_say() -> None:
    checkpoint = Checkpoint(TINY)
    tokens = heldout.tokens(TINY, TINY / "heldout.txt", SEQUENCES, SEQ_LEN, checkpoint.config.vocab_size)
    dtypes = (torch.float32, torch.bfloat16)
    found = Distance.between(*(log_probabilities(checkpoint, tokens, dtype, CPU) for dtype in dtypes))
    assert found.mean < 0.002
    assert found.calm_mean < 0.0003  # 0.00025; 0.00044 with the router and attention in BF16
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
