"""v4forge.gptq against GPTQ written out in float64 and against llm-compressor's, and what calibration makes of experts
that few tokens reach."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from safetensors.torch import load_file
from synthetic import write_checkpoint
from torch import Tensor

from v4forge import calibration, experts, gptq, layers, layout, model, one_layer
from v4forge.checkpoint import Checkpoint, write_shard
from v4forge.codec import unpack_int4
from v4forge.corpus import Corpus
from v4forge.watch import Watch

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


def lost_by_row(weights: Tensor, q: gptq.Quantized, hessians: Tensor) -> Tensor:
    """(w - q) H (w - q)^T of every row, [E, out] f64, q = code * scale."""
    left = weights.double() - q.codes.double() * q.scale.double().repeat_interleave(128, -1)
    return ((left @ hessians.double()) * left).sum(-1)


def weighted_error(weights: Tensor, served: Tensor, hessians: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T), [E] f64; 0 where the denominator is 0."""
    w, left, h = weights.double(), weights.double() - served.double(), hessians.double()
    lost, whole = (((m @ h) * m).sum((1, 2)) for m in (left, w))
    return torch.where(whole > 0, lost / whole, 0.0)


def indefinite(width: int) -> Tensor:
    """A symmetric matrix with a positive diagonal and a negative eigenvalue, far beyond what dampening mends."""
    return torch.eye(width) * -1 + 2


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
        # what is served is a code times its group's scale, in BF16
        served = (q.codes.float() * q.scale.float().repeat_interleave(128, -1)).bfloat16()
        assert torch.equal(q.dequantized(), served)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("seed", range(3))
def test_gptq_loses_less_than_round_to_nearest_on_every_matrix(seed: int, scales: str) -> None:
    p = problem(seed)
    both = quantized(p, scales=scales)
    ours, nearest = (weighted_error(p.weights, q.dequantized(), p.hessians) for q in both)
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
    torch.testing.assert_close(weighted_error(p.weights, ours.dequantized(), p.hessians), direct, rtol=1e-4, atol=0)
    left = p.weights.float() - ours.dequantized().float()
    shares = [gptq.energy(m, p.hessians).double().sum(1) for m in (left, p.weights)]
    torch.testing.assert_close(shares[0] / shares[1], direct, rtol=1e-4, atol=0)


def test_the_sweep_counts_what_every_row_loses(solved: tuple[Problem, gptq.Quantized, gptq.Quantized]) -> None:
    p, ours, _ = solved
    again, lost = gptq.sweep(p.weights, gptq.factorize(p.hessians, DAMPENING), ours.scale)
    assert torch.equal(again.codes, ours.codes)
    assert lost.shape == (EXPERTS, OUT)
    torch.testing.assert_close(lost.double(), lost_by_row(p.weights, ours, p.hessians), rtol=1e-3, atol=0)


def test_the_energy_of_a_row_is_its_product_with_the_hessian() -> None:
    p = problem(8)
    expected = (torch.einsum("eri,eij->erj", p.weights.double(), p.hessians.double()) * p.weights.double()).sum(-1)
    torch.testing.assert_close(gptq.energy(p.weights, p.hessians).double(), expected, rtol=1e-5, atol=0)
    shared = (p.weights.double() @ p.hessians[1].double() * p.weights.double()).sum(-1)
    torch.testing.assert_close(gptq.energy(p.weights, p.hessians[1:2]).double(), shared, rtol=1e-5, atol=0)


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
    lost = [weighted_error(p.weights, q.dequantized(), p.hessians) for q in (ours, reference)]
    torch.testing.assert_close(*lost, rtol=1e-3, atol=0)


def test_an_input_that_was_never_active_keeps_its_weights() -> None:
    p = problem(3)
    dead = [0, 100, 255]
    p.x[:, :, dead] = 0
    p.hessians = torch.stack([gptq.gram(each) / TOKENS for each in p.x])
    ours, nearest = quantized(p)
    # nothing is known about it, so nothing is better than the nearest code
    assert torch.equal(ours.codes[..., dead], nearest.codes[..., dead])
    assert bool((ours.codes[..., dead] != 0).any())
    alive = weighted_error(p.weights, ours.dequantized(), p.hessians)
    assert bool((alive < weighted_error(p.weights, nearest.dequantized(), p.hessians)).all())


def test_an_expert_without_any_input_is_rounded_to_nearest() -> None:
    p = problem(4)
    p.hessians[2] = 0
    ours, nearest = quantized(p)
    assert torch.equal(ours.codes[2], nearest.codes[2])
    assert weighted_error(p.weights, ours.dequantized(), p.hessians)[2] == 0


def test_a_factor_multiplies_out_to_the_dampened_hessian() -> None:
    p = problem(9)
    factor = gptq.factorize(p.hessians, DAMPENING)
    assert not bool(factor.failed.any())
    for e in range(EXPERTS):
        lower, order = factor.lower[e].double(), factor.order[e]
        assert order.sort().values.tolist() == list(range(IN))
        activity = p.hessians[e].diagonal()[order]
        assert bool((activity[1:] >= activity[:-1]).all())
        assert torch.equal(lower, lower.tril()) and bool((lower.diagonal() == 1).all())
        damp = DAMPENING * p.hessians[e].double().diagonal().mean()
        wanted = p.hessians[e].double()[order][:, order] + damp * torch.eye(IN)
        assert float(factor.damp[e]) == pytest.approx(float(damp), rel=1e-5)
        product = lower * factor.pivots[e].double() @ lower.T
        assert float((product - wanted).norm() / wanted.norm()) < 1e-6


class OnGpu(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("width", [64, 128, 300, 512])
def test_the_factorization_in_blocks_is_cholesky_s(width: int) -> None:
    x = torch.randn(5, 2 * width, width, generator=torch.Generator().manual_seed(width))
    hessians = x.mT @ x / len(x[0])
    hessians[1], hessians[4] = indefinite(width), torch.eye(width)
    hessians[4, -1, -1] = -1  # fails in the last block
    factors, failed = gptq._cholesky(hessians.clone().as_subclass(OnGpu))
    assert failed.tolist() == [False, True, False, False, True]
    for e in (0, 2, 3):
        lower = factors[e].as_subclass(Tensor).double()
        assert torch.equal(lower, lower.tril())
        wanted = hessians[e].double()
        assert float((lower @ lower.T - wanted).norm() / wanted.norm()) < 1e-6
        torch.testing.assert_close(lower, torch.linalg.cholesky(wanted), rtol=1e-4, atol=1e-5)


def test_one_factor_serves_all_experts_that_read_the_same_input() -> None:
    p = problem(10)
    scale = SCALES["searched"](p)
    shared = gptq.sweep(p.weights, gptq.factorize(p.hessians[:1], DAMPENING), scale)
    copied = gptq.sweep(p.weights, gptq.factorize(p.hessians[:1].repeat(EXPERTS, 1, 1), DAMPENING), scale)
    assert torch.equal(shared[0].codes, copied[0].codes)
    torch.testing.assert_close(shared[1], copied[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_agrees_with_llm_compressor_s(seed: int) -> None:
    p = problem(20 + seed)
    ours, _ = quantized(p)
    scale = ours.scale.float()
    theirs, _, fallback = quantize_weight(
        p.weights.float(), p.hessians.clone(), scale, torch.zeros_like(scale), None, gptq.QUANT_ARGS, 128, DAMPENING
    )
    assert not bool(fallback.any())
    codes = (theirs / scale.repeat_interleave(128, -1)).round().to(torch.int8)
    assert float((codes == ours.codes).double().mean()) > 0.99
    lost = [lost_by_row(p.weights, gptq.Quantized(c, ours.scale), p.hessians).sum(1) for c in (ours.codes, codes)]
    assert bool((lost[0] <= 1.001 * lost[1]).all()), lost


def test_an_expert_whose_hessian_cannot_be_factorized_is_rounded_to_nearest() -> None:
    p = problem(4)
    undisturbed, _ = quantized(p)
    p.hessians[1] = indefinite(IN)
    ours, nearest = quantized(p)
    assert gptq.factorize(p.hessians, DAMPENING).failed.tolist() == [False, True, False]
    assert torch.equal(ours.codes[1], nearest.codes[1])
    others = [e for e in range(EXPERTS) if e != 1]
    assert torch.equal(ours.codes[others], undisturbed.codes[others])


def test_a_hessian_with_a_negative_diagonal_is_rounded_to_nearest() -> None:
    p = problem(4)
    p.hessians[1] = -torch.eye(IN)
    ours, nearest = quantized(p)
    assert torch.equal(ours.codes[1], nearest.codes[1])


RARE = 5  # the only token that layer 0 sends to expert 2
HASHED, ROUTED = 0, 1


@dataclass
class Calibrated:
    """A source in which layer 0's table never routes to expert 3 and rarely to 2, and layer 1's router never to 0."""

    source: Checkpoint
    work: Path
    tokens: Tensor  # [samples, seq_len]

    def again(self, work: Path) -> Calibrated:
        """The same into another folder, whatever has been changed meanwhile."""
        mark = {"a": "fingerprint"}
        layers.claim(work, mark, "refuse", print)
        corpus = Corpus(self.tokens, "sha256", 0, "random tokens")
        calibration.calibrate(self.source, corpus, work, layers.Settings(micro_batch=4), mark, CPU)
        return Calibrated(self.source, work, self.tokens)

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
    return Calibrated(Checkpoint(folder / "source"), folder, tokens).again(folder / "work")


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
def experts_input(calibrated: Calibrated) -> Tensor:
    """What enters the experts of the first layer, [tokens, hidden]."""
    config = model.hf_config(calibrated.source.config)
    weights = model.Weights(calibrated.source, CPU)
    streams = model.embed(model.load_root(weights, config), config, calibrated.tokens)
    context = model.Rotary(config, CPU, weights.dtype).context(calibrated.tokens)
    return model.attend(model.load_layer(weights, config, HASHED), streams, context).x


def table_of(source: Checkpoint) -> Tensor:
    return source.raw(f"layers.{HASHED}.ffn.gate.tid2eid")


def test_an_expert_without_tokens_is_quantized_for_the_tokens_of_the_others(calibrated: Calibrated) -> None:
    x = experts_input(calibrated)
    everything = (gptq.gram(x) / len(x))[None]
    for which in ("w1", "w3"):
        wanted, found = calibrated.matrix(HASHED, 3, which)
        nearest = gptq.round_to_nearest(wanted, found.scale)
        lost = [weighted_error(wanted, q.dequantized(), everything) for q in (found, nearest)]
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


def test_a_matrix_that_gptq_gave_up_is_named_in_the_layer_s_report(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = experts.hessians

    def disturbed(rows: list[Tensor], gate_up: Tensor, *rest: Any) -> experts.Hessians:
        made = undisturbed(rows, gate_up, *rest)
        for i, e in enumerate(rest[-1]):
            if e in (1, 2):
                made.inner[i] = indefinite(made.inner.shape[-1])
            if e == 2:
                made.hidden[i] = indefinite(made.hidden.shape[-1])
        return made

    monkeypatch.setattr(experts, "hessians", disturbed)
    found = calibrated.again(tmp_path)
    for layer in calibrated.source.config.layers:
        assert found.report(layer)["fallback"] == ["w2 of expert 1", "w1, w3 of expert 2", "w2 of expert 2"]
    for expert, which in ((1, "w2"), (2, "w1"), (2, "w2"), (2, "w3")):
        wanted, stored = found.matrix(ROUTED, expert, which)
        assert torch.equal(stored.codes, gptq.round_to_nearest(wanted, stored.scale).codes)
    kept, changed = (load_file(layers.layer_file(work, HASHED)) for work in (calibrated.work, found.work))
    differing = {".".join(n.split(".")[4:6]) for n in kept if not torch.equal(kept[n], changed[n])}
    assert differing == {"1.w2", "2.w1", "2.w2", "2.w3"}


def test_the_number_of_experts_quantized_at_a_time_changes_no_code() -> None:
    p = problem(5)
    gate_up = p.weights.repeat(1, 6, 1)[:, :256]
    down = gate_up[..., :128]
    inner = p.hessians[:, :128, :128].contiguous()

    def of(*numbers: int) -> experts.Experts:
        some = list(numbers)
        h = experts.Hessians(p.hessians[some], inner[some], [])
        return experts.quantize(gate_up[some], down[some], h, layers.Settings(), some, Watch(CPU))

    whole, parts = of(0, 1, 2), (of(0, 1), of(2))
    for kind in ("gate_up", "down"):
        for part in ("codes", "scale"):
            joined = torch.cat([getattr(getattr(each, kind), part) for each in parts])
            assert torch.equal(getattr(getattr(whole, kind), part), joined)
    for which, methods in whole.error.items():
        for method, values in methods.items():
            assert parts[0].error[which][method] + parts[1].error[which][method] == pytest.approx(values, rel=1e-5)


def test_the_number_of_experts_in_a_step_changes_no_code(
    calibrated: Calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_layer, "EXPERT_BATCH", {"cpu": 3})
    found = calibrated.again(tmp_path)
    for layer in calibrated.source.config.layers:
        one, three = (load_file(layers.layer_file(work, layer)) for work in (calibrated.work, found.work))
        assert [n for n in one if not torch.equal(one[n], three[n])] == []
        for which, methods in calibrated.report(layer)["error"].items():
            for method, values in methods.items():
                assert found.report(layer)["error"][which][method] == pytest.approx(values, rel=1e-5)


def test_what_the_report_says_is_lost_is_what_the_codes_lose(calibrated: Calibrated) -> None:
    config = calibrated.source.config
    source, x = calibrated.source, experts_input(calibrated)
    for which in ("w1", "w3"):
        for expert in (0, 1):  # which have tokens enough, so that nothing is blended
            wanted, found = calibrated.matrix(HASHED, expert, which)
            rows = x[(table_of(source)[calibrated.tokens.flatten()] == expert).any(-1)]
            assert len(rows) >= config.hidden_size
            hessian = (rows.double().T @ rows.double() / len(rows))[None]
            nearest = experts.nearest(wanted.bfloat16())
            errors = calibrated.report(HASHED)["error"][which]
            for method, q in (("gptq", found), ("rtn", nearest)):
                exact = weighted_error(wanted, q.dequantized(), hessian)
                assert errors[method][expert] == pytest.approx(float(exact), rel=1e-2)
