"""benchmarks.attention: what it times as "before" is the same layer, every query with every key."""

from __future__ import annotations

import pytest
import torch

from benchmarks import attention
from benchmarks.flash_layers import config_dict
from v4forge.checkpoint import layout
from v4forge.model.attention import attention as ours
from v4forge.model.layer_classes import ATTENTION, hf


@torch.no_grad()
def test_a_layer_gives_now_what_it_gave_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TIMED", 1)
    config = layout.parse_config(config_dict(3, small=True), "config.json")
    found = [row for row, _ in attention.layers_rows(config, 2, 150, torch.device("cpu"), list(attention.KINDS))]
    assert [row["layer"] for row in found] == list(attention.KINDS)
    assert all(row["streams_differ"] < 1e-3 for row in found)
    assert hf.ALL_ATTENTION_FUNCTIONS[ATTENTION] is ours
