"""v4forge.quantization.gptq against GPTQ written out in float64 and against llm-compressor's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import DAMPENING, EXPERTS, IN, OUT, TOKENS, OnGpu, Problem, indefinite, problem, weighted_error
from torch import Tensor

from v4forge.quantization import gptq, peer_gptq

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


@pytest.mark.parametrize("count", [0, 1, 63, 64, 100_000])
def test_as_many_of_all_tokens_as_there_are_inputs_count_with_an_expert_s_own(count: int) -> None:
    own, everything = (torch.randn(64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    expected = (count * own.double() + 64 * everything.double()) / (count + 64)
    torch.testing.assert_close(gptq.blended(own, count, everything).double(), expected, rtol=1e-5, atol=1e-6)


def test_codes_are_4_bit_and_scales_are_usable(solved: tuple[Problem, gptq.Quantized, gptq.Quantized]) -> None:
    p, *both = solved
    for q in both:
        assert q.codes.dtype == torch.int8
        assert q.codes.shape == p.weights.shape
        assert (int(q.codes.min()), int(q.codes.max())) == (-8, 7)
        assert q.scale.dtype == torch.bfloat16
        assert q.scale.shape == (EXPERTS, OUT, IN // 128)
        assert bool(q.scale.isfinite().all() and (q.scale != 0).all())
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
    assert bool((searched <= absmax * 1.001).all())  # the best scale is rounded to BF16
    assert float(searched.sum()) < 0.85 * float(absmax.sum())


def test_a_searched_scale_is_the_best_of_all_on_weights_that_lie_on_few_values() -> None:
    """FP4's own values, each group's largest only on one side: no scale of a fine scan, of either sign, is better."""
    generator = torch.Generator().manual_seed(6)
    values = torch.tensor([-3.0, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    weights = values[torch.randint(len(values), (1, 64, 128), generator=generator)]
    weights[:, ::2] *= -1
    importance = torch.rand(1, 128, generator=generator) + 0.1
    found = gptq.searched_scales(weights, importance)
    assert bool((found < 0).any() and (found > 0).any())

    def errors(scale: Tensor) -> Tensor:
        """scale: [n, 64] -> [n, 64]."""
        step = scale.double().unsqueeze(-1)
        left = (weights[0] / step).round().clamp(-8, 7) * step - weights[0]
        return (left.square() * importance[0].double()).sum(-1)

    scan = torch.linspace(0.4, 1.4, 2001) * 6 / 7.5
    best = errors(torch.cat((scan, -scan)).view(-1, 1).expand(-1, 64)).amin(0)
    assert bool((errors(found[:, :, 0])[0] <= 1.02 * best).all())


def test_refitted_scales_lose_less_and_solving_them_out_gains_little_more() -> None:
    p = problem(11)
    before, _ = quantized(p)
    after = gptq.refit(p.weights, before, p.hessians, DAMPENING)
    assert torch.equal(after.codes, before.codes)
    lost = [lost_by_row(p.weights, q, p.hessians) for q in (before, after)]
    assert bool((lost[1] <= 1.001 * lost[0]).all())  # row by row, but for BF16
    codes = before.codes.double().unflatten(-1, (-1, 128))
    best = []  # of all scales, row by row in float64
    for e, h in enumerate(p.hessians.double()):
        for w, c in zip(p.weights[e].double(), codes[e], strict=True):
            spread = torch.block_diag(*c)  # [groups, in]
            fitted = torch.linalg.solve(spread @ h @ spread.T, spread @ h @ w)
            left = w - fitted @ spread
            best.append(left @ h @ left)
    least = torch.stack(best).view_as(lost[0])
    gained, possible = (lost[0] - lost[1]).sum(), (lost[0] - least).sum()
    assert float(gained) > 0.75 * float(possible) > 0


def test_a_refit_leaves_what_a_hessian_says_nothing_about() -> None:
    p = problem(12)
    p.hessians[1] = 0
    before, _ = quantized(p)
    after = gptq.refit(p.weights, before, p.hessians, DAMPENING)
    assert torch.equal(after.scale[1], before.scale[1]) and not torch.equal(after.scale[0], before.scale[0])
    shared = gptq.refit(p.weights, before, p.hessians[:1], DAMPENING)
    torch.testing.assert_close(
        shared.scale, gptq.refit(p.weights, before, p.hessians[:1].repeat(3, 1, 1), DAMPENING).scale
    )


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
        product = lower * factor.pivots[e].double() @ lower.T
        assert float((product - wanted).norm() / wanted.norm()) < 1e-6


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
    assert torch.equal(shared.codes, copied.codes)


@pytest.mark.parametrize("seed", range(3))
def test_gptq_agrees_with_llm_compressor_s(seed: int) -> None:
    p = problem(20 + seed)
    ours, _ = quantized(p)
    before = p.hessians.clone()
    theirs, fallback = peer_gptq.quantized(p.weights, p.hessians, ours.scale, DAMPENING)
    assert not bool(fallback.any()) and torch.equal(p.hessians, before)
    assert float((theirs.codes == ours.codes).double().mean()) > 0.99
    lost = [lost_by_row(p.weights, each, p.hessians).sum(1) for each in (ours, theirs)]
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
