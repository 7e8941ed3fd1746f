"""model.indexer picks what transformers' indexer picks, with scores of some queries at a time or with none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from synthetic import config_dict
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.model import deepseek_v4, indexer
from v4forge.model.layer_classes import hf

BATCH, SEQ = 2, 90  # 22 compressed keys


def picked(topk: int) -> list[Tensor]:
    """What our indexer picks, and what transformers' does of the same: [batch, seq, keys] bool each."""
    config = layout.parse_config(config_dict(index_topk=topk), "config.json")
    own = deepseek_v4.hf_config(config)
    generator = torch.Generator().manual_seed(4)
    theirs, ours = hf.DeepseekV4Indexer(own), indexer.Indexer(own)
    for parameter in theirs.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(BATCH, SEQ, config.hidden_size, generator=generator)
    residual = torch.randn(BATCH, SEQ, config.q_lora_rank, generator=generator)
    given = (x, residual, torch.arange(SEQ).unsqueeze(0), None, 0)
    found = []
    for each in (ours, theirs):
        numbers = each(*given)
        seen = torch.zeros(BATCH, SEQ, SEQ // 4 + 1, dtype=torch.bool)
        found.append(seen.scatter_(-1, numbers.where(numbers >= 0, SEQ // 4), True)[..., :-1])
    return found


@torch.no_grad()
@pytest.mark.parametrize("at_a_time", [1, 2000, 1 << 26], ids=["a query", "some", "all"])
def test_what_is_picked_is_what_transformers_picks(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "SCORES", at_a_time)
    ours, theirs = picked(5)
    assert torch.equal(ours, theirs)
    assert int(ours[:, -1].sum(-1).max()) == 5


@torch.no_grad()
def test_nothing_is_scored_where_all_keys_are_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(indexer.Scorer, "forward", lambda *given: called.append(given))
    ours, theirs = picked(SEQ // 4)
    assert torch.equal(ours, theirs) and not called
