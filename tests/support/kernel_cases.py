"""The kernels of quantization.kernels beside the torch code of quantization.gptq, on the same tensors, and those of
model.kernels beside the same in F64: for the tests on both devices.

`TRITON_INTERPRET=1 python tests/support/kernel_cases.py` compares them on the CPU, where Triton's interpreter runs the
kernels, and prints JSON: test_kernels.py reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from unittest import mock

import attention_cases
import torch
from attention_cases import Form
from torch import Tensor

from v4forge.model import kernels as model_kernels
from v4forge.quantization import gptq, kernels

DAMPENING = 0.01
TORCH_BLOCK, KERNEL_BLOCK = gptq._sweep_block, kernels.sweep_block


def problem(experts: int, rows: int, width: int, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor]:
    """weights: [E, rows, width] bf16 with a few outliers; hessians: [E, width, width] f32, of correlated inputs of very
    different sizes."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weights = normal(experts, rows, width) / width**0.5
    weights *= torch.where(torch.rand(weights.shape, generator=generator, device=device) < 0.01, 4.0, 1.0)
    hessians = torch.empty(experts, width, width, device=device)
    for each in hessians:
        mixing = normal(width, width) / width**0.5 + torch.eye(width, device=device)
        sizes = torch.rand(width, generator=generator, device=device) ** 2 + 0.05
        x = ((normal(2 * width, width) * sizes) @ mixing).bfloat16()
        each.copy_(gptq.gram(x) / len(x))
    return weights.bfloat16(), hessians


@dataclass(frozen=True)
class Blocks:
    """The kernel beside the torch code over the blocks of a sweep: the worst block of each figure."""

    blocks: int
    codes_equal: float  # share
    residual_off: float  # largest difference where the codes are equal, in steps of the scale
    outside_touched: bool  # whether the kernel has written into other columns


def blocks(weights: Tensor, factor: gptq.Factor, scale: Tensor) -> Blocks:
    """Each block of a sweep by the torch code, and by the kernel on the same inputs."""
    found: list[Blocks] = []
    step = float(scale.float().amax())

    def both(start: int, end: int, *rest: Tensor) -> None:
        inputs, outputs = rest[:5], rest[5:]
        residual, codes = (tensor.clone() for tensor in outputs)
        KERNEL_BLOCK(start, end, *inputs, residual, codes)
        before = [tensor.clone() for tensor in outputs]
        TORCH_BLOCK(start, end, *inputs, *outputs)
        equal = (codes == outputs[1])[..., start:end]
        off = (residual - outputs[0])[..., start:end].abs() / step
        for mine, then in ((residual, before[0]), (codes, before[1])):
            mine[..., start:end] = then[..., start:end]
        found.append(
            Blocks(
                1,
                float(equal.double().mean()),
                float(torch.where(equal, off, 0).max()),
                # as bytes: what has not been written yet may be NaN
                not all(
                    torch.equal(mine.view(torch.uint8), then.view(torch.uint8))
                    for mine, then in ((residual, before[0]), (codes, before[1]))
                ),
            )
        )

    with mock.patch.object(gptq, "_sweep_block", both), mock.patch.object(kernels, "sweep_block", both):
        gptq.sweep(weights, factor, scale)
    return Blocks(
        len(found),
        min(each.codes_equal for each in found),
        max(each.residual_off for each in found),
        any(each.outside_touched for each in found),
    )


@dataclass(frozen=True)
class Scales:
    """The kernel's scales beside the torch code's."""

    groups: int
    equal: float  # share of the groups
    negative: float  # share of the groups
    worse: float  # by how much the kernel's rounding error is larger where they differ, relative, at most


def scales(weights: Tensor, importance: Tensor, widest: Tensor, grid: tuple[float, ...]) -> Scales:
    """weights: [E, out, in]; importance: [E, in] f32; widest: [E, out, in/128] bf16. The torch code runs on the CPU."""
    kernel_s = kernels.searched_scales(weights, importance, widest, grid).cpu()
    weights, importance, widest = weights.cpu(), importance.cpu(), widest.cpu()
    with mock.patch.object(gptq, "SCALE_GRID", grid), mock.patch.object(gptq, "absmax_scales", lambda _weights: widest):
        torch_s = gptq.searched_scales(weights, importance)
    by_input = importance.double().unflatten(-1, (-1, 128)).unsqueeze(1)

    def error(scale: Tensor) -> Tensor:
        step = scale.double().repeat_interleave(128, -1)
        left = (weights.double() / step).round().clamp(-8, 7) * step - weights.double()
        return (left.unflatten(-1, (-1, 128)).square() * by_input).sum(-1)

    differ = kernel_s != torch_s  # a sum in another order may also round to BF16's neighbour
    worse = (error(kernel_s) / error(torch_s) - 1)[differ] if bool(differ.any()) else torch.zeros(1)
    return Scales(
        differ.numel(), 1 - float(differ.double().mean()), float((torch_s < 0).double().mean()), float(worse.max())
    )


@dataclass(frozen=True)
class Mixed:
    """The kernel's streams beside the same in F64."""

    off: float  # largest difference, in units of the largest value
    rounded_once: float  # share of the values that are the exact ones rounded to the streams' dtype


def mixed(tokens: tuple[int, ...], hidden: int, dtype: torch.dtype, device: str, kind: str) -> Mixed:
    """kind: "carried", without an output; "output"; or "transposed", with streams that do not lie in order."""
    generator = torch.Generator(device).manual_seed(3)
    shape = tokens[::-1] if kind == "transposed" else tokens
    streams = torch.randn(*shape, 4, hidden, generator=generator, device=device).to(dtype)
    if kind == "transposed":
        streams = streams.transpose(0, 1)
    comb = torch.rand(*tokens, 4, 4, generator=generator, device=device).to(dtype)
    post = torch.rand(*tokens, 4, generator=generator, device=device).to(dtype)
    output = torch.randn(*tokens, hidden, generator=generator, device=device).to(dtype)
    exact = torch.einsum("...fh,...ft->...th", streams.double(), comb.double())
    if kind != "carried":
        exact += post.double().unsqueeze(-1) * output.double().unsqueeze(-2)
    found = model_kernels.mixed(streams, comb, post, None if kind == "carried" else output)
    assert (found.dtype, found.shape) == (dtype, streams.shape)
    return Mixed(
        float((found.double() - exact).abs().max() / exact.abs().max()),
        float((found == exact.to(dtype)).double().mean()),
    )


def attended(form: Form, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> float:
    """How far the kernel's attention is from F64's, relative to its size."""
    case = attention_cases.inputs(form, dtype=dtype, device=device)
    ratio = case.module.compressor.compress_rate if case.module.compressor else 0
    bias = case.bias if case.bias.shape[-1] else None
    found = model_kernels.attended(case.query, case.key, bias, case.module.sinks, case.scaling, case.window, ratio)
    exact = case.exact()
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    return float((found.double() - exact).norm() / exact.norm())


# 37 tokens: more than one program's, and not a multiple; windows of 8, and compressed keys of more than one step
ATTENDED = {
    "sliding": Form(2, 4, 37, 16, 8),
    "compressed": Form(1, 8, 37, 32, 8, 4),
    "chosen": Form(2, 4, 37, 16, 8, 4, True),
    "many compressed": Form(1, 4, 70, 16, 8, 2, True),
    "too short": Form(1, 4, 7, 16, 8, 16),
}


def main() -> None:
    weights, hessians = problem(2, 40, 256)  # 40 rows: more than one program's, and not a multiple
    absmax = gptq.absmax_scales(weights)
    own, shared = gptq.factorize(hessians, DAMPENING), gptq.factorize(hessians[:1], DAMPENING)
    result = {
        "own": blocks(weights, own, absmax),
        "shared": blocks(weights.float(), shared, absmax),
        "scales": scales(weights, hessians.diagonal(dim1=-2, dim2=-1), absmax, (1.0, 0.5, 0.75)),
    }
    result |= {kind: mixed((2, 3), 1300, torch.float32, "cpu", kind) for kind in ("carried", "output", "transposed")}
    told = {name: asdict(each) for name, each in result.items()}
    told["attended"] = {name: attended(form, dtype=torch.float32, device="cpu") for name, form in ATTENDED.items()}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
