"""benchmarks.flash_layers: its checkpoint is one in the upstream form, with weights that behave, and reproducible."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from programs import contents
from synthetic import artifact_shard

from benchmarks import flash_layers
from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import run_main
from v4forge.model import deepseek_v4, evaluation
from v4forge.pipeline import requirements

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("flash-layers")
    flash_layers.write_checkpoint(out, flash_layers.config_dict(3, small=True), 0, CPU)
    return Checkpoint(out)


def test_full_size_layers_are_flash_layers() -> None:
    config = layout.parse_config(flash_layers.config_dict(4), "config.json")
    assert config.compress_ratios == (0, 4, 128, 4, 0)
    flash = dict(layout.layer_parameters(requirements.flash_config(), 3))
    assert {n.replace("layers.2.", "layers.3."): s for n, s in layout.layer_parameters(config, 2)} == flash


def test_the_checkpoint_is_in_the_upstream_form(small: Checkpoint) -> None:
    small.validate(layout.upstream(small.config))
    assert len(small.shard_names) == 5
    blocks = {(shard, artifact_shard(name)) for name, shard in small.weight_map.items()}
    assert sorted(block for _, block in blocks) == ["layers.0", "layers.1", "layers.2", "mtp", "root"]


def test_the_same_seed_gives_the_same_bytes(small: Checkpoint, tmp_path: Path) -> None:
    for seed in (0, 1):
        flash_layers.write_checkpoint(tmp_path / str(seed), small.config.raw, seed, CPU)
    assert contents(tmp_path / "0") == contents(small.directory)
    assert contents(tmp_path / "1") != contents(small.directory)


def test_a_predictable_model_and_its_drafts_write_what_follows(tmp_path: Path) -> None:
    raw = flash_layers.config_dict(3, small=True)
    flash_layers.write_checkpoint(tmp_path, raw, 0, CPU, predicts=True)
    source = Checkpoint(tmp_path)
    text = [torch.arange(4, 8).unsqueeze(1)]
    for _ in range(23):
        text.append(flash_layers.follower(text[-1], source.config.vocab_size))
    (quality,) = evaluation.compare([source], torch.cat(text, 1), CPU)
    assert bool((quality.nll < 1).all()) and bool((quality.nll > 1e-4).all())  # clear, and yet no certainty
    assert bool((quality.accepted >= quality.judged - 1).all()) and int(quality.judged.sum()) > 200
    followers = flash_layers.follower(torch.arange(129280), 129280)
    assert len(followers.unique()) == 129280


@pytest.mark.parametrize("name", ["layers.0.ffn.experts.7.w2", "layers.2.ffn.experts.0.w1", "mtp.0.ffn.experts.3.w3"])
def test_an_expert_decodes_to_a_gaussian(small: Checkpoint, name: str) -> None:
    weight = small.load(f"{name}.weight", (256, 256)).double().flatten() * 16  # std 1/sqrt(256) before FP4
    assert abs(weight.mean()) < 0.02
    assert weight.std() == pytest.approx(1, abs=0.03)
    assert weight.pow(4).mean() / weight.var() ** 2 == pytest.approx(3, abs=0.3)
    assert (weight == 0).double().mean() < 0.2


def test_no_two_experts_are_alike(small: Checkpoint) -> None:
    names = [n for n in small.weight_map if ".experts." in n and n.endswith(".weight")]
    assert len({small.raw(n).numpy().tobytes() for n in names}) == len(names) == 4 * 8 * 3


def test_a_token_routes_to_distinct_experts(small: Checkpoint) -> None:
    table = small.raw("layers.0.ffn.gate.tid2eid")
    assert table.dtype == torch.int64
    assert bool((table[:, 0] != table[:, 1]).all())
    assert table.unique().tolist() == list(range(8))


@torch.no_grad()
def test_a_forward_pass_stays_of_order_one(small: Checkpoint) -> None:
    weights = deepseek_v4.Weights(small, CPU)
    config = deepseek_v4.hf_config(small.config)
    tokens = flash_layers.zipf_tokens(2, 160, small.config.vocab_size, 0)
    context = deepseek_v4.Rotary(config, CPU, weights.dtype).context(tokens)
    streams = deepseek_v4.embed(deepseek_v4.load_root(weights, config), config, tokens)
    for index in small.config.layers:
        layer = deepseek_v4.load_layer(weights, config, index)
        attended = deepseek_v4.attend(layer, streams, context)
        experts = layer.mlp.experts
        routed = deepseek_v4.routed_experts(attended, experts.gate_up_proj, experts.down_proj, experts.limit)
        streams = deepseek_v4.combine(attended, routed)
        channels = attended.x.float().pow(2).mean(0).sqrt()
        assert channels.max() / channels.min() > 5, "the experts' inputs have channels of different sizes"
        assert 1e-3 < routed.float().std() < 100
        assert bool(streams.isfinite().all())
        assert 0.1 < streams.float().std() < 100


def test_tokens_are_distributed_as_words_are() -> None:
    tokens = flash_layers.zipf_tokens(64, 512, 1000, 7)
    assert tokens.shape == (64, 512) and tokens.dtype == torch.int64
    assert torch.equal(tokens, flash_layers.zipf_tokens(64, 512, 1000, 7))
    counts = torch.bincount(tokens.flatten(), minlength=1000)
    frequencies = counts.sort(descending=True).values / tokens.numel()
    harmonic = sum(1 / rank for rank in range(1, 1001))
    assert frequencies[0] == pytest.approx(1 / harmonic, rel=0.05)
    assert frequencies[9] == pytest.approx(0.1 / harmonic, rel=0.2)
    assert counts.argsort(descending=True)[:10].tolist() != list(range(10))


def test_the_program_names_every_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["flash_layers", "--out", str(tmp_path), "--layers", "1", "--device", "cpu", "--small"]
    with mock.patch.object(sys, "argv", arguments), pytest.raises(SystemExit) as end:
        run_main(flash_layers.main)
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(lines) == 3 and all(" GB " in line and " s" in line for line in lines)
