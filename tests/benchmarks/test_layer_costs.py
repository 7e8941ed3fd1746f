"""benchmarks.layer_costs: mixtures of forms are what they say, and cost what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems import CPU, problem, weighted_error

from benchmarks import layer_costs
from benchmarks.code_ways import NOW, groups_of, quantized
from benchmarks.lab import TINY, Lab, demo_tokens, held_out
from benchmarks.layer_costs import Table
from benchmarks.mixtures import FLASH_SHARE, FP8, G64, INT4, SOURCE, Mixtures, with_experts, with_layer
from v4forge.checkpoint.formats import INT4_GROUP
from v4forge.checkpoint.reader import Checkpoint
from v4forge.quantization import gptq


@pytest.fixture(scope="module")
def mixtures() -> Mixtures:
    with torch.no_grad():
        lab = Lab(Checkpoint(Path(TINY.source)), demo_tokens(4), [], CPU)
        return Mixtures(lab, held_out(4, 64), 2)


def test_a_mixture_is_of_the_forms_it_names(mixtures: Mixtures) -> None:
    whole, source = mixtures.even(INT4), mixtures.even(SOURCE)
    own = mixtures.forms[1]
    gate_up, down = mixtures.pair(1, with_experts(whole, [(1, 3)], FP8)[1])
    for made, of in ((gate_up, 0), (down, 1)):
        assert torch.equal(made[3], own[FP8][of][3]) and torch.equal(made[4], own[INT4][of][4])
    with torch.no_grad():
        exact, all_int4 = (float(mixtures.quality(each).kl.nansum()) for each in (source, whole))
        alone = [float(mixtures.quality(with_layer(source, i, INT4)).kl.nansum()) for i in range(4)]
    assert exact == 0
    assert min(alone) > 0 and max(alone) < all_int4


def test_smaller_groups_lose_less_and_leave_the_size_as_it_was() -> None:
    p = problem(3)
    lost = {}
    for size in (64, 128):
        with groups_of(size, CPU):
            found = quantized(p.weights, p.hessians, NOW)
            lost[size] = float(weighted_error(p.weights, found.dequantized(), p.hessians).sum())
        assert found.scale.shape[-1] * size == p.weights.shape[-1]
    assert lost[64] < 0.97 * lost[128]
    assert gptq.INT4_GROUP == INT4_GROUP == 128


def test_bytes_are_those_of_the_layouts(mixtures: Mixtures) -> None:
    whole = mixtures.even(INT4)
    more = mixtures.more_bytes(mixtures.even(G64))
    assert mixtures.more_bytes(whole) == {"tiny": 0, "flash": 0}
    assert more["flash"] == pytest.approx(100 * 0.125 / 4.125 * FLASH_SHARE) and 2.5 < more["flash"] < 2.6
    assert more["tiny"] < more["flash"]
    mixture, of_hash = mixtures.hash_routed(G64)
    assert mixture == with_layer(whole, 0, G64) and of_hash["flash"] == pytest.approx(more["flash"] * 3 / 43)
    assert layer_costs.affordable(mixtures, G64, 4) == 3


def test_a_row_tells_what_comes_back_and_every_draft_position(mixtures: Mixtures) -> None:
    with torch.no_grad():
        table = Table(mixtures)
        assert table.add("whole", "the source", mixtures.even(SOURCE)) == 1
        assert table.add("whole", "the artifact", mixtures.even(INT4)) == 0
        drafted = table.add("whole", "its MTP block, too", mixtures.even(INT4), INT4)
    assert drafted == 0, "drafts are no part of the model's own distribution"
    source, artifact, _ = table.rows
    assert [d["position"] for d in artifact["drafts"]] == [1, 2]
    assert source["drafts"][0]["against_source"] == {"value": 0, "low": 0, "high": 0}
    assert artifact["drafts"][0]["judged"] == 4 * 63
    assert 0.3 < artifact["drafts"][0]["acceptance"]["value"] < 0.9
