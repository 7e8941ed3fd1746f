"""What quantization does on a GPU, at DeepSeek-V4-Flash's widths, against the torch code and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from kernel_cases import DAMPENING, blocks, mixed, problem, scales

from v4forge.checkpoint import codec
from v4forge.quantization import gptq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
SHAPES = {"w1 and w3": (2, 4096, 4096), "w2": (2, 4096, 2048), "odd": (3, 100, 384)}  # experts, rows, width

Problem = tuple[Tensor, Tensor]


@pytest.fixture(scope="module", params=SHAPES)
def matrices(request: pytest.FixtureRequest) -> Problem:
    """Weights and Hessians."""
    return problem(*SHAPES[request.param], device="cuda")


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_block_of_the_sweep_is_the_torch_code_s(matrices: Problem, shared: bool) -> None:
    weights, hessians = matrices
    factor = gptq.factorize(hessians[:1] if shared else hessians, DAMPENING)
    found = blocks(weights, factor, gptq.absmax_scales(weights))
    assert found.blocks == weights.shape[-1] // gptq.SWEEP_COLUMNS
    assert found.codes_equal > 0.9995  # a kernel fuses products with sums: a target half way may fall to either side
    assert not found.outside_touched


def lost(weights: Tensor, found: gptq.Quantized, hessians: Tensor) -> Tensor:
    """Of every row in float64, [E, out]."""
    left = weights.double() - found.codes.double() * found.scale.double().repeat_interleave(128, -1)
    return ((left @ hessians.double()) * left).sum(-1)


def test_the_energy_of_what_the_rows_lose_is_the_exact_one(matrices: Problem) -> None:
    weights, hessians = matrices
    found = gptq.gptq(weights, hessians, gptq.absmax_scales(weights), DAMPENING)
    left = weights.float() - found.codes.float() * found.scale.float().repeat_interleave(128, -1)
    exact = lost(weights, found, hessians).sum()
    torch.testing.assert_close(gptq.energy(left, hessians).double().sum(), exact, rtol=1e-3, atol=0)


def test_refitted_scales_lose_less_on_every_row(matrices: Problem) -> None:
    weights, hessians = matrices
    scale = gptq.searched_scales(weights, hessians.diagonal(dim1=-2, dim2=-1))
    before = gptq.gptq(weights, hessians, scale, DAMPENING)
    after = gptq.refit(weights, before, hessians, DAMPENING)
    assert torch.equal(after.codes, before.codes)
    assert bool((lost(weights, after, hessians) <= 1.002 * lost(weights, before, hessians)).all())


def test_gptq_loses_as_much_as_on_the_cpu() -> None:
    weights, hessians = problem(2, 256, 1024, device="cuda")
    scale = gptq.absmax_scales(weights)
    there, here = (
        gptq.gptq(*(tensor.to(device) for tensor in (weights, hessians, scale)), DAMPENING)
        for device in ("cuda", "cpu")
    )
    assert float((there.codes.cpu() == here.codes).double().mean()) > 0.98
    both = (lost(weights.cpu(), gptq.Quantized(q.codes.cpu(), q.scale.cpu()), hessians.cpu()) for q in (there, here))
    torch.testing.assert_close(*(each.sum(1) for each in both), rtol=1e-3, atol=0)


def test_the_searched_scales_are_the_torch_code_s(matrices: Problem) -> None:
    weights, hessians = matrices
    importance = hessians.diagonal(dim1=-2, dim2=-1)
    found = scales(weights, importance, gptq.absmax_scales(weights), gptq.SCALE_GRID)
    assert 0.1 < found.negative < 0.9
    assert found.equal >= 0.999
    assert found.worse < 0.05  # where a weight lies half way between two codes


def test_a_factor_multiplies_out_to_the_dampened_hessian(matrices: Problem) -> None:
    _, hessians = matrices
    factor = gptq.factorize(hessians, DAMPENING)
    assert not bool(factor.failed.any())
    for h, order, lower, pivots in zip(hessians, factor.order, factor.lower, factor.pivots, strict=True):
        wanted = h.double()[order][:, order]
        wanted += DAMPENING * h.double().diagonal().mean() * torch.eye(len(h), device=h.device)
        assert bool((lower == lower.tril()).all())
        product = lower.double() * pivots.double() @ lower.double().T
        assert float((product - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("bad", [0, -1])
def test_only_the_hessian_that_cannot_be_factorized_fails(bad: int) -> None:
    _, hessians = problem(3, 1, 512, device="cuda")
    whole = gptq.factorize(hessians, DAMPENING)
    hessians[1, bad] = hessians[1, :, bad] = 0
    hessians[1, bad, bad - 1] = hessians[1, bad - 1, bad] = 100
    hessians[1, bad, bad] = 1
    found = gptq.factorize(hessians, DAMPENING)
    assert found.failed.tolist() == [False, True, False]
    assert torch.equal(found.lower[1], torch.eye(512, device="cuda"))
    for e in (0, 2):
        torch.testing.assert_close(found.lower[e], whole.lower[e])


@pytest.mark.parametrize(("tokens", "width"), [(1, 2048), (1000, 2048), (100_000, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_is_the_sum_of_outer_products(tokens: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, width, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(dtype)
    exact = sum(part.double().T @ part.double() for part in x.split(10_000))
    found = gptq.gram(x)
    assert found.dtype == torch.float32
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-4
    sizes = exact.diagonal().sqrt()
    assert float(((found.double() - exact) / torch.outer(sizes, sizes)).abs().max()) < 1e-4  # F32 sums of 100,000 terms


@pytest.mark.parametrize("kind", ["carried", "output", "transposed"])
@pytest.mark.parametrize("hidden", [4096, 1300])
def test_the_mixed_streams_are_the_exact_ones_rounded_once(hidden: int, kind: str) -> None:
    found = mixed((8, 100), hidden, torch.bfloat16, "cuda", kind)
    assert found.off < 2**-8
    assert found.rounded_once > 0.999  # the rest lies half way between two BF16 numbers, but for F32's rounding


def test_gram_of_no_tokens_is_zero() -> None:
    assert not bool(gptq.gram(torch.empty(0, 256, dtype=torch.bfloat16, device="cuda")).any())


def test_fp4_decodes_as_on_the_cpu_for_every_byte_and_scale() -> None:
    scale = torch.arange(253, dtype=torch.uint8).view(-1, 1).expand(-1, 16).contiguous().view(torch.float8_e8m0fnu)
    byte = torch.arange(256, dtype=torch.uint8).expand(253, -1).contiguous().view(torch.int8)
    wanted = codec.decode_fp4(byte, scale)
    assert bool(wanted[0].any()), "a scale below BF16's normal numbers"
    found = codec.decode_fp4(byte.cuda(), scale.cuda()).cpu()
    assert torch.equal(found.view(torch.int16), wanted.view(torch.int16))


def test_int4_is_packed_and_served_as_on_the_cpu() -> None:
    codes = torch.randint(-8, 8, (3, 64, 512), dtype=torch.int8)
    scale = torch.rand(3, 64, 4).bfloat16()
    assert torch.equal(codec.pack_int4(codes.cuda()).cpu(), codec.pack_int4(codes))
    assert torch.equal(codec.dequantize_int4(codes.cuda(), scale.cuda()).cpu(), codec.dequantize_int4(codes, scale))
