"""v4forge.gptq against GPTQ written out in float64, and what calibration makes of experts that few tokens reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic import write_checkpoint
from torch import Tensor

from v4forge import calibration, gptq, layers, layout, model
from v4forge.checkpoint import Checkpoint, write_shard
from v4forge.codec import unpack_int4
from v4forge.corpus import Corpus

CPU = torch.device("cpu")
DAMPENING = 0.01
EXPERTS, OUT, IN, TOKENS = 3, 48, 256, 700


@dataclass
class Problem:
    """weights: [E, out, in] bf16; x: [E, tokens, in] bf16; hessians: [E, in, in] f32, means of x^T x."""

    weights: Tensor
    x: Tensor
    hessians: Tensor


def problem(seed: int = 0) -> Problem:
    """Correlated inputs of very different sizes, as activations are; weights with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(EXPERTS, IN, IN, generator=generator) / IN**0.5 + torch.eye(IN)
    sizes = torch.rand(EXPERTS, 1, IN, generator=generator) ** 2 + 0.05
    x = ((torch.randn(EXPERTS, TOKENS, IN, generator=generator) * sizes) @ mixing).bfloat16()
    weights = torch.randn(EXPERTS, OUT, IN, generator=generator) / IN**0.5
    weights *= torch.where(torch.rand(weights.shape, generator=generator) < 0.01, 4.0, 1.0)
    return Problem(weights.bfloat16(), x, torch.stack([gptq.gram(each) / TOKENS for each in x]))


SCALES: dict[str, Callable[[Problem], Tensor]] = {
    "absmax": lambda p: gptq.absmax_scales(p.weights),
    "searched": lambda p: gptq.searched_scales(p.weights, p.hessians.diagonal(dim1=-2, dim2=-1)),
}


def quantized(
    p: Problem, dampening: float = DAMPENING, scales: str = "searched"
) -> tuple[gptq.Quantized, gptq.Quantized]:
    """GPTQ and round-to-nearest with the same scales."""
    scale = SCALES[scales](p)
    return gptq.gptq(p.weights, p.hessians, scale, dampening), gptq.round_to_nearest(p.weights, scale)


@pytest.fixture(scope="module", params=SCALES)
def solved(request: pytest.FixtureRequest) -> tuple[Problem, gptq.Quantized, gptq.Quantized]:
    p = problem()
    return p, *quantized(p, scales=request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_is_the_sum_of_outer_products(dtype: torch.dtype) -> None:
    x = torch.randn(500, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = sum(torch.outer(row, row) for row in x.double())
    gram = gptq.gram(x)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram.double(), exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("count", [0, 1, 17, 63])
def test_too_few_tokens_are_filled_up_with_the_mean_over_all(count: int) -> None:
    own, everything = (torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    missing = 64 - count
    expected = (count * own.double() + missing * everything.double()) / (count + missing)
    torch.testing.assert_close(gptq.blended(own, count, everything).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [64, 65, 100_000])
def test_enough_tokens_are_left_alone(count: int) -> None:
    own, everything = (torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    torch.testing.assert_close(gptq.blended(own, count, everything), own, rtol=1e-6, atol=0)


def test_codes_are_4_bit_and_scales_are_usable(solved: tuple[Problem, gptq.Quantized, gptq.Quantized]) -> None:
    p, *both = solved
    for q in both:
        assert q.codes.dtype == torch.int8
        assert q.codes.shape == p.weights.shape
        assert (int(q.codes.min()), int(q.codes.max())) == (-8, 7)
        assert q.scale.dtype == torch.bfloat16
        assert q.scale.shape == (EXPERTS, OUT, IN // 128)
        assert bool(q.scale.isfinite().all() and (q.scale > 0).all())
        assert q.fallback == ()
        # what is served is a code times its group's scale, in BF16
        served = (q.codes.float() * q.scale.float().repeat_interleave(128, -1)).bfloat16()
        assert torch.equal(q.dequantized(), served)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("seed", range(3))
def test_gptq_loses_less_than_round_to_nearest_on_every_matrix(seed: int, scales: str) -> None:
    p = problem(seed)
    both = quantized(p, scales=scales)
    ours, nearest = (gptq.weighted_error(p.weights, q.dequantized(), p.hessians) for q in both)
    assert bool((ours < 0.9 * nearest).all()), (ours, nearest)


def test_no_searched_scale_rounds_active_inputs_worse_than_absmax() -> None:
    p = problem(5)
    importance = p.hessians.double().diagonal(dim1=-2, dim2=-1).unsqueeze(1)

    def by_group(scales: str) -> Tensor:
        served = gptq.round_to_nearest(p.weights, SCALES[scales](p)).codes.double()
        served *= SCALES[scales](p).double().repeat_interleave(128, -1)
        return ((served - p.weights.double()).square() * importance).unflatten(-1, (-1, 128)).sum(-1)

    searched, absmax = by_group("searched"), by_group("absmax")
    assert bool((searched <= absmax * (1 + 1e-5)).all())
    assert float(searched.sum()) < 0.97 * float(absmax.sum())


def test_the_weighted_error_is_the_share_of_the_output_that_is_lost(
    solved: tuple[Problem, gptq.Quantized, gptq.Quantized],
) -> None:
    p, ours, _ = solved
    w, x, served = p.weights.double(), p.x.double(), ours.dequantized().double()
    direct = ((w - served) @ x.mT).square().sum((1, 2)) / (w @ x.mT).square().sum((1, 2))
    torch.testing.assert_close(
        gptq.weighted_error(p.weights, ours.dequantized(), p.hessians), direct, rtol=1e-4, atol=0
    )


def test_round_to_nearest_finds_the_nearest_of_all_16_codes(
    solved: tuple[Problem, gptq.Quantized, gptq.Quantized],
) -> None:
    p, _, nearest = solved
    scale = nearest.scale.double().repeat_interleave(128, -1).unsqueeze(-1)
    distances = (p.weights.double().unsqueeze(-1) - torch.arange(-8, 8) * scale).abs()
    chosen = distances.gather(-1, nearest.codes.long().unsqueeze(-1) + 8)
    torch.testing.assert_close(chosen, distances.amin(-1, keepdim=True), rtol=0, atol=1e-7)


def written_out(weights: Tensor, hessian: Tensor, scale: Tensor, dampening: float) -> Tensor:
    """GPTQ by its definition, one column after the other in float64: [out, in] -> codes.

    Frantar et al. 2022, algorithm 1 with blocks of one column; columns by falling diagonal, scales fixed beforehand.
    """
    w, h = weights.double(), hessian.double()
    h = h + dampening * h.diagonal().mean() * torch.eye(len(h))
    order = h.diagonal().argsort(descending=True).tolist()
    w, h = w[:, order].clone(), h[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.zeros_like(w)
    for i, column in enumerate(order):
        s = scale.double()[:, column // 128]
        codes[:, i] = (w[:, i] / s).round().clamp(-8, 7)
        error = (w[:, i] - codes[:, i] * s) / upper[i, i]
        w[:, i:] -= torch.outer(error, upper[i, i:])
    back = torch.empty_like(codes)
    back[:, order] = codes
    return back


@pytest.mark.parametrize("dampening", [0.01, 0.1])
def test_gptq_agrees_with_its_definition_in_float64(dampening: float) -> None:
    p = problem(7)
    ours, _ = quantized(p, dampening)
    codes = torch.stack(
        [written_out(w, h, s, dampening) for w, h, s in zip(p.weights, p.hessians, ours.scale, strict=True)]
    )
    assert float((ours.codes == codes).double().mean()) > 0.999
    reference = gptq.Quantized(codes.to(torch.int8), ours.scale)
    lost = [gptq.weighted_error(p.weights, q.dequantized(), p.hessians) for q in (ours, reference)]
    torch.testing.assert_close(*lost, rtol=1e-3, atol=0)


def test_an_input_that_was_never_active_keeps_its_weights() -> None:
    p = problem(3)
    dead = [0, 100, 255]
    p.x[:, :, dead] = 0
    p.hessians = torch.stack([gptq.gram(each) / TOKENS for each in p.x])
    ours, nearest = quantized(p)
    assert ours.fallback == ()
    # nothing is known about it, so nothing is better than the nearest code
    assert torch.equal(ours.codes[..., dead], nearest.codes[..., dead])
    assert bool((ours.codes[..., dead] != 0).any())
    alive = gptq.weighted_error(p.weights, ours.dequantized(), p.hessians)
    assert bool((alive < gptq.weighted_error(p.weights, nearest.dequantized(), p.hessians)).all())


def test_an_expert_without_any_input_is_rounded_to_nearest() -> None:
    p = problem(4)
    p.hessians[2] = 0
    ours, nearest = quantized(p)
    assert torch.equal(ours.codes[2], nearest.codes[2])
    assert gptq.weighted_error(p.weights, ours.dequantized(), p.hessians)[2] == 0


def test_an_expert_whose_factorization_fails_is_rounded_to_nearest_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(4)
    whole = gptq._kernel()

    def failing(weights: Tensor, hessians: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
        if bool((hessians == p.hessians[1]).all((1, 2)).any()):
            raise torch.linalg.LinAlgError("not positive-definite")
        return whole(weights, hessians, *rest)

    undisturbed, nearest = quantized(p)
    monkeypatch.setattr(gptq, "_kernel", lambda: failing)
    ours, _ = quantized(p)
    assert ours.fallback == (1,)
    assert torch.equal(ours.codes[1], nearest.codes[1])
    others = [e for e in range(EXPERTS) if e != 1]
    assert torch.equal(ours.codes[others], undisturbed.codes[others])


RARE = 5  # the only token that layer 0 sends to expert 2
HASHED, ROUTED = 0, 1


@dataclass
class Calibrated:
    """A source in which layer 0's table never routes to expert 3 and rarely to 2, and layer 1's router never to 0."""

    source: Checkpoint
    work: Path
    tokens: Tensor  # [samples, seq_len]

    def report(self, layer: int) -> dict:
        return json.loads(layers.layer_report(self.work, layer).read_text())

    def matrix(self, layer: int, expert: int, which: str) -> tuple[Tensor, gptq.Quantized]:
        """The source's weight and what calibration made of it, each with a leading dimension of 1."""
        base = f"layers.{layer}.ffn.experts.{expert}.{which}"
        stored = load_file(layers.layer_file(self.work, layer))
        codes = unpack_int4(stored[f"{base}.weight_packed"], stored[f"{base}.weight_shape"])
        shape = tuple(codes.shape)
        wanted = self.source.load(f"{base}.weight", shape).float()
        return wanted[None], gptq.Quantized(codes[None], stored[f"{base}.weight_scale"][None])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    folder = tmp_path_factory.mktemp("few")
    write_checkpoint(folder / "source", shards=1)
    (shard,) = (folder / "source").glob("*.safetensors")
    tensors = load_file(shard)
    table = tensors[f"layers.{HASHED}.ffn.gate.tid2eid"]
    table[:] = torch.tensor([0, 1])
    table[RARE] = torch.tensor([0, 2])
    tensors[f"layers.{ROUTED}.ffn.gate.bias"][0] = -100
    write_shard(shard, tensors)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(64, (8, 64), generator=generator)
    source = Checkpoint(folder / "source")
    mark = {"a": "fingerprint"}
    layers.claim(folder / "work", mark, "refuse", print)
    corpus = Corpus(tokens, "sha256", 0, "random tokens")
    calibration.calibrate(source, corpus, folder / "work", layers.Settings(micro_batch=4), mark, CPU)
    return Calibrated(source, folder / "work", tokens)


def test_experts_that_few_tokens_reach_are_listed_with_their_tokens(calibrated: Calibrated) -> None:
    rare = int((calibrated.tokens == RARE).sum())
    assert 0 < rare < 128
    hashed, routed = calibrated.report(HASHED), calibrated.report(ROUTED)
    everything = calibrated.tokens.numel()
    assert hashed["tokens"] == [everything, everything - rare, rare, 0]
    assert {note["expert"]: note["tokens"] for note in hashed["blended"]} == {2: rare, 3: 0}
    assert routed["tokens"][0] == 0
    assert sum(routed["tokens"]) == 2 * everything
    assert {"expert": 0, "tokens": 0}.items() <= routed["blended"][0].items()
    assert hashed["fallback"] == routed["fallback"] == []


@pytest.mark.parametrize(("layer", "expert"), [(HASHED, 2), (HASHED, 3), (ROUTED, 0)])
def test_experts_that_few_tokens_reach_are_their_source_and_not_zero(
    calibrated: Calibrated, layer: int, expert: int
) -> None:
    for which in ("w1", "w2", "w3"):
        wanted, found = calibrated.matrix(layer, expert, which)
        assert len(found.codes.unique()) == 16
        served = found.dequantized().float()
        assert float((served - wanted).norm() / wanted.norm()) < 0.3
        # the kernel ran on a Hessian: an expert without one would be rounded to nearest
        assert not torch.equal(found.codes, gptq.round_to_nearest(wanted, found.scale).codes)


@torch.no_grad()
def test_an_expert_without_tokens_is_quantized_for_the_tokens_of_the_others(calibrated: Calibrated) -> None:
    source = calibrated.source
    config = model.hf_config(source.config)
    weights = model.Weights(source, CPU)
    streams = model.embed(model.load_root(weights, config), config, calibrated.tokens)
    context = model.Rotary(config, CPU, weights.dtype).context(calibrated.tokens)
    x = model.attend(model.load_layer(weights, config, HASHED), streams, context).x
    everything = (gptq.gram(x) / len(x))[None]
    for which in ("w1", "w3"):
        wanted, found = calibrated.matrix(HASHED, 3, which)
        nearest = gptq.round_to_nearest(wanted, found.scale)
        lost = [gptq.weighted_error(wanted, q.dequantized(), everything) for q in (found, nearest)]
        assert bool(lost[0] < 0.9 * lost[1]), lost


def test_an_expert_with_enough_tokens_does_better_than_round_to_nearest(calibrated: Calibrated) -> None:
    config = calibrated.source.config
    compared = 0
    for layer in config.layers:
        report = calibrated.report(layer)
        for which, width in (
            ("w1", config.hidden_size),
            ("w2", config.moe_intermediate_size),
            ("w3", config.hidden_size),
        ):
            for tokens, ours, nearest in zip(report["tokens"], *report["error"][which].values(), strict=True):
                if tokens >= width:
                    assert ours < nearest
                    compared += 1
    assert list(report["error"]["w1"]) == ["gptq", "rtn"]
    assert compared > 20


def test_layer_files_hold_exactly_their_layer_of_the_artifact(calibrated: Calibrated) -> None:
    expected = layout.artifact(calibrated.source.config)
    for layer in calibrated.source.config.layers:
        stored = load_file(layers.layer_file(calibrated.work, layer))
        assert set(stored) == {n for n in expected if n.startswith(f"layers.{layer}.")}


def test_the_number_of_experts_quantized_at_a_time_changes_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(5)
    gate_up = p.weights.repeat(1, 6, 1)[:, :256]
    down = gate_up[..., :128]
    inner = p.hessians[:, :128, :128].contiguous()
    hessians = calibration.Hessians(p.hessians, inner, [TOKENS] * EXPERTS, [])
    whole = calibration.quantize(gate_up, down, hessians, layers.Settings())
    monkeypatch.setattr(calibration, "EXPERT_BATCH", 2)
    parts = calibration.quantize(gate_up, down, hessians, layers.Settings())
    assert torch.equal(whole.gate_up.codes, parts.gate_up.codes) and torch.equal(whole.down.codes, parts.down.codes)
    assert torch.equal(whole.gate_up.scale, parts.gate_up.scale) and torch.equal(whole.down.scale, parts.down.scale)
    for which, methods in whole.report["error"].items():
        for method, values in methods.items():
            assert parts.report["error"][which][method] == pytest.approx(values, rel=1e-12)
