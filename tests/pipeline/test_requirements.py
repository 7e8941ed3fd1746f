"""requirements: what a GPU holds in attention, against what torch allocates for it."""

from __future__ import annotations

import pytest
import torch
from synthetic import config_dict
from torch.profiler import ProfilerActivity, profile

from v4forge.checkpoint import layout
from v4forge.model import attention, deepseek_v4, indexer
from v4forge.model.layer_classes import hf
from v4forge.pipeline import requirements
from v4forge.quantization.layer_files import Settings
from v4forge.units import GIB

CPU = torch.device("cpu")
HEADS = {
    "many heads": {"num_attention_heads": 32},
    "a wide indexer": {"index_n_heads": 32},
    "all picked": {"index_topk": 512},
}


@torch.no_grad()
def peak_bytes(config: layout.Config, samples: int, seq_len: int) -> int:
    """Of a forward pass of a compressed sparse attention, the parameters not counted."""
    own = deepseek_v4.hf_config(config)
    module = hf.DeepseekV4Attention(own, config.compress_ratios.index(4))
    indexer.use_own_indexer(module, own)
    for name, parameter in module.named_parameters():
        made = 0.05 * torch.randn(parameter.shape)
        parameter.data = made if name.endswith(("sinks", "position_bias")) else made.bfloat16()
    context = deepseek_v4.Rotary(own, CPU, torch.bfloat16).context(torch.zeros(samples, seq_len, dtype=torch.int64))
    x = torch.randn(samples, seq_len, config.hidden_size).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        module(x, context.position_embeddings, context.position_ids, context.attention_mask)
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("seq_len", [512, 2048])
@pytest.mark.parametrize("form", HEADS)
def test_attention_holds_what_is_planned_for_it(form: str, seq_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LOGITS", 1 << 18)  # so that the other terms show
    monkeypatch.setattr(indexer, "SCORES", 1 << 18)
    monkeypatch.setattr(requirements, "LOGITS_BYTES", 14 << 18)
    monkeypatch.setattr(requirements, "SCORES_BYTES", 8 << 18)
    monkeypatch.setattr(Settings, "micro_batch", lambda _, tokens: 2048 // tokens)
    config = layout.parse_config(config_dict(**HEADS[form]), "config.json")
    planned = requirements.attention_bytes(config, seq_len)
    assert 0.5 * planned < peak_bytes(config, 2048 // seq_len, seq_len) < planned


def test_the_plan_knows_how_many_logits_attention_holds() -> None:
    assert requirements.LOGITS_BYTES == 14 * attention.LOGITS
    assert requirements.SCORES_BYTES == 8 * indexer.SCORES


def test_longer_samples_of_flash_fit_into_the_budget_of_the_experts() -> None:
    config = requirements.flash_config()
    lengths = (512, 2048, 4096, 8192, 16384, 65536)
    needed = {seq_len: requirements.attention_bytes(config, seq_len) / GIB for seq_len in lengths}
    assert needed[512] < 2 and needed[2048] < 2 and needed[4096] < 3 and needed[8192] < 5 and needed[16384] < 9
    assert needed[65536] > 26  # and then it is what counts
    held = 65536 * 4096 * 2 * (4 + 2)
    assert requirements.gpu_bytes(config, 1, 65536) == held + max(
        requirements.attention_bytes(config, 65536), 6 * 65536 * 4096 * 2 + requirements.WORKING_SET_BYTES
    )


@pytest.mark.parametrize(("seq_len", "samples"), [(512, 8), (256, 16), (2048, 2), (4096, 1), (5000, 1)])
def test_a_forward_pass_has_as_many_samples_as_its_tokens_allow(seq_len: int, samples: int) -> None:
    assert Settings().micro_batch(seq_len) == samples
