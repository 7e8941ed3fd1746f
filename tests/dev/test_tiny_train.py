"""dev.tiny.train, and the committed model that it made."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from synthetic import TINY, config_dict
from torch import Tensor

from dev.tiny import text, train
from v4forge.checkpoint import codec, layout
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import rule_for
from v4forge.model import deepseek_v4, evaluation

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("fmt", "encode", "decode", "shape"),
    [
        ("fp4", codec.encode_fp4, codec.decode_fp4, (7, 96)),
        ("fp8", codec.encode_fp8, codec.decode_fp8, (130, 260)),
    ],
)
def test_rounding_in_training_is_what_the_stored_form_reads_back_as(fmt: str, encode, decode, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.exp2(3 * torch.randn(shape, generator=generator))
    expected = decode(**encode(weight)).float()
    assert torch.equal(train.rounded(weight, fmt), expected)
    if fmt == "fp4":  # experts are stacked
        assert torch.equal(train.rounded(torch.stack((weight, 2 * weight)), fmt)[1], 2 * expected)


def test_other_formats_are_not_rounded_in_training() -> None:
    weight = torch.randn(3, 5)
    assert train.rounded(weight, "f32") is weight


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> layout.Config:
    """The training at a size that a CPU steps through, in shards small enough that there are several."""
    raw = config_dict()
    monkeypatch.setattr(train, "CONFIG", raw)
    monkeypatch.setattr(train, "SHARD_BYTES", 1 << 18)
    return layout.parse_config(raw, "config.json")


SETTINGS = train.Settings(steps=2, batch=2, seq_len=140, warmup=1)


def test_steps_on_one_batch_lower_both_losses(small: layout.Config) -> None:
    trainer = train.Trainer(small, SETTINGS, CPU)
    trainer.tokens.copy_(torch.arange(2 * 142).view(2, 142) * 7 % small.vocab_size)
    losses = []
    for quantized in (False, False, False, False, True, True):
        trainer.step(quantized)
        losses.append(trainer.losses.clone())
    assert all(loss.isfinite().all() for loss in losses)
    assert (losses[3] < losses[0] - 0.05).all()
    assert (losses[5] < losses[0] - 0.05).all()


def test_a_trained_model_is_exported_bit_for_bit(small: layout.Config, tmp_path: Path) -> None:
    text = torch.randint(small.vocab_size, (2000,), generator=torch.Generator().manual_seed(1))
    seen: list[int] = []

    def progress(step: int, main: float, draft: float) -> None:
        assert math.isfinite(main) and math.isfinite(draft)
        seen.append(step)

    trained, config = train.train(text, SETTINGS, CPU, progress)
    assert seen == [0, 1]
    train.export(trained, config, tmp_path)
    exported = Checkpoint(tmp_path)
    assert exported.config.raw == config_dict()
    exported.validate(layout.upstream(config))
    assert len(exported.shard_names) >= 2 and weights_apart_from_their_scales(exported)
    masters = dict(train.logical_tensors(trained, config))
    for name, shape in layout.parameters(config):
        tensor = exported.load(name, shape)
        assert torch.equal(tensor, masters[name].detach().to(tensor.dtype)), name
        assert tensor.dtype == masters[name].dtype or rule_for(name).source == "int"


def weights_apart_from_their_scales(checkpoint: Checkpoint) -> list[str]:
    where: dict[str, str] = checkpoint.weight_map
    scales = [n for n in where if n.endswith(".scale")]
    return [n for n in scales if where[n] != where[n.removesuffix("scale") + "weight"]]


@torch.no_grad()
def test_the_training_forward_is_the_pipelines_forward() -> None:
    """Dense experts with weights of zero in training, sorted tokens elsewhere: the same losses up to BF16 rounding."""
    checkpoint = Checkpoint(TINY)
    tiny = train.TinyModel(checkpoint.config, CPU)
    for name, tensor in train.logical_tensors(tiny, checkpoint.config):
        loaded = checkpoint.load(name, tuple(tensor.shape))
        tensor.data.copy_(loaded)
    for parameter, reference in zip(tiny.parameters(), tiny_parameters_dtypes(tiny, checkpoint.config), strict=True):
        parameter.data = parameter.data.to(reference)
    tokens = heldout()[:2, :258]
    main, draft, loads = tiny(tokens)
    weights = deepseek_v4.Weights(checkpoint, CPU)
    config = deepseek_v4.hf_config(checkpoint.config)
    root = deepseek_v4.load_root(weights, config)
    context = deepseek_v4.Rotary(config, CPU, torch.bfloat16).context(tokens[:, :-2])
    streams = deepseek_v4.embed(root, config, tokens[:, :-2])
    for index in checkpoint.config.layers:
        streams = deepseek_v4.run_layer(deepseek_v4.load_layer(weights, config, index), streams, context)
    logits = root.final(streams, root.head)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:-1].flatten())
    assert main == pytest.approx(float(expected), rel=5e-3)
    assert draft < 2 * main
    for load in loads:  # top-k experts a token
        assert float(load.sum()) == pytest.approx(checkpoint.config.num_experts_per_tok, rel=1e-5)


def tiny_parameters_dtypes(tiny: train.TinyModel, config: layout.Config) -> list[torch.dtype]:
    f32 = {t.data_ptr() for n, t in train.logical_tensors(tiny, config) if rule_for(n).source == "f32"}
    return [torch.float32 if p.data_ptr() in f32 else torch.bfloat16 for p in tiny.parameters()]


def heldout() -> Tensor:
    tokens = torch.from_numpy(text.heldout_tokens(TINY, TINY / "heldout.txt").astype("int64"))
    return tokens[: len(tokens) // 512 * 512].view(-1, 512)


def test_the_committed_model_is_in_the_upstream_form() -> None:
    committed = Checkpoint(TINY)
    committed.validate(layout.upstream(committed.config))
    assert committed.config.raw == train.CONFIG
    assert len(committed.shard_names) >= 2
    assert weights_apart_from_their_scales(committed)
    for logical, shape in layout.parameters(committed.config):
        committed.load(logical, shape)


def test_the_committed_model_is_small() -> None:
    files = [p for p in TINY.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 20_000_000
    assert all(p.stat().st_size < 16 << 20 for p in files)


def test_the_committed_model_is_trained() -> None:
    """A third of the unigram model's perplexity and half of the drafts accepted, on text that it was not trained on."""
    tokens = heldout()
    quality = evaluation.evaluate(Checkpoint(TINY), tokens[::24], CPU)
    assert quality.tokens == len(tokens[::24]) * 511
    assert quality.perplexity < evaluation.unigram_perplexity(tokens) / 3
    assert quality.mtp_acceptance > 0.5
    figures = json.loads((TINY / "training.json").read_text())
    assert quality.perplexity == pytest.approx(figures["perplexity"], rel=0.3)
    assert figures["unigram_perplexity"] == pytest.approx(evaluation.unigram_perplexity(tokens))


def test_the_unigram_perplexity_of_equally_frequent_tokens_is_their_number() -> None:
    assert evaluation.unigram_perplexity(torch.arange(40) % 8) == pytest.approx(8)
    assert evaluation.unigram_perplexity(torch.tensor([0, 0, 0, 9])) == pytest.approx(4 * 3**-0.75)
