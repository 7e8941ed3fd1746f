"""The ways to find codes and scales that benchmarks/codes.py ranks: what calibration does, did, and was seen not to do.

Those that calibration does not do are here alone. Shapes as in v4forge/quantization/gptq.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from v4forge.checkpoint.formats import INT4_GROUP
from v4forge.model import deepseek_v4
from v4forge.quantization import experts, gptq

Pair = tuple[Tensor, Tensor]  # gate_up [E, 2 * inner, hidden] and down [E, hidden, inner], as served

BEFORE = (1.0, *(1.1 - i / 30 for i in range(13) if i != 3))  # the grid that calibration had


@dataclass(frozen=True)
class Way:
    """scales: of weights and importance; prior: tokens of all that count with an expert's own `count`, from `count` and
    width; even: those scaled to the expert's own energy; refit: conjugate gradient steps of gptq.refit, or to the
    solution; passes: of coordinate descent over the codes; target: the share of w2's target that undoes what w1 and w3
    lose (GPTAQ, Li et al. 2025, arXiv 2504.02692).
    """

    scales: Callable[[Tensor, Tensor], Tensor] = gptq.searched_scales
    dampening: float | None = 0.02  # None: round to nearest
    prior: Callable[[int, int], float] = lambda _count, width: width
    even: bool = False
    damped_scales: bool = True  # whether dampening counts with the importance of an input for its group's scale
    refit: str = "step"  # or "", or "solved"
    passes: int = 0
    target: float = 0.0
    target_dampening: float = 0.05


def gridded(grid: Sequence[float], signed: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """The candidate itself that rounds best, of a grid in units of absmax / 7.5; of either sign if `signed`."""

    def scales(weights: Tensor, importance: Tensor) -> Tensor:
        widest = gptq.absmax_scales(weights).float()
        groups = weights.float().unflatten(-1, (-1, INT4_GROUP))
        by_input = importance.unflatten(-1, (-1, INT4_GROUP)).unsqueeze(1)
        best, least = widest, torch.full_like(widest, torch.inf)
        for factor in (f * sign for f in grid for sign in ((1, -1) if signed else (1,))):
            scale = (widest * factor).to(torch.bfloat16).float()
            step = scale.unsqueeze(-1)
            error = (((groups / step).round().clamp(-8, 7) * step - groups).square() * by_input).sum(-1)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return best.to(torch.bfloat16)

    return scales


def fitted(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """gptq.searched_scales from another number of candidates."""

    def scales(weights: Tensor, importance: Tensor) -> Tensor:
        grid = (1.0, *(0.5 + 0.8 * i / (count - 1) for i in range(count)))
        with mock.patch.object(gptq, "SCALE_GRID", grid):
            return gptq.searched_scales(weights, importance)

    return scales


NOW = Way()
PLAIN = replace(NOW, refit="")
WAS = Way(gridded(BEFORE), 0.01, lambda count, width: max(0, width - count), damped_scales=False, refit="")
DEFAULT = "before"
WAYS = {
    DEFAULT: WAS,
    "round to nearest, absmax scales": replace(WAS, scales=lambda w, _: gptq.absmax_scales(w), dampening=None),
    "round to nearest, the scales from before": replace(WAS, dampening=None),
    "round to nearest, the scales of now": replace(PLAIN, dampening=None),
    "absmax scales": replace(WAS, scales=lambda w, _: gptq.absmax_scales(w)),
    "grid with 1.25": replace(WAS, scales=gridded((*BEFORE, 1.25))),
    "grid of 34": replace(WAS, scales=gridded([1.0, *(0.5 + 0.8 * i / 33 for i in range(34))])),
    "signed grid of 34": replace(WAS, scales=gridded([1.0, *(0.5 + 0.8 * i / 33 for i in range(34))], signed=True)),
    "signed, fitted from 8": replace(WAS, scales=fitted(8)),
    "signed, fitted from 12": replace(WAS, scales=gptq.searched_scales),
    "signed, fitted from 64": replace(WAS, scales=fitted(64)),
    **{
        f"{name}, dampening {share}": replace(PLAIN, prior=prior, dampening=share)
        for name, prior in (
            ("filled up", WAS.prior),
            ("one width of all", NOW.prior),
            ("two widths", lambda _, w: 2 * w),
        )
        for share in (0.01, 0.02, 0.05)
    },
    "now": NOW,
    "now, refit solved out": replace(NOW, refit="solved"),
    "now, 1 pass over the codes": replace(NOW, passes=1),
    "now, 2 passes over the codes": replace(NOW, passes=2),
    "now, w2 undoes half of w1 and w3": replace(NOW, target=0.5),
    "now, w2 undoes w1 and w3": replace(NOW, target=1.0),
    "now, w2 undoes w1 and w3, dampened by 1": replace(NOW, target=1.0, target_dampening=1.0),
}

# What an expert's Hessians take of all tokens'. A prior of the other experts' tokens alone is another weight of the
# same two: their mean is what is left of everybody's without the expert's own.
BLENDS = {
    "one width of all: now": NOW,
    "its own tokens alone": replace(NOW, prior=lambda _, w: 0),
    "filled up to a width": replace(NOW, prior=WAS.prior),
    "one width, for experts below a width alone": replace(NOW, prior=lambda n, w: w if n < w else 0),
    "half a width": replace(NOW, prior=lambda _, w: w / 2),
    "two widths": replace(NOW, prior=lambda _, w: 2 * w),
    "four widths": replace(NOW, prior=lambda _, w: 4 * w),
    "one width, scaled to the expert's energy first": replace(NOW, even=True),
}


@contextmanager
def groups_of(size: int, device: torch.device) -> Iterator[None]:
    """INT4 in groups of `size` inputs, for a device's arithmetic of gptq.py."""
    modules = ["v4forge.quantization.gptq", "v4forge.checkpoint.codec"]
    if device.type == "cuda":
        modules.append("v4forge.quantization.kernels")
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch(f"{module}.INT4_GROUP", size))
        yield


def quantized_experts(
    gate_up: Tensor, down: Tensor, rows: Sequence[Tensor], common: experts.Common, way: Way, limit: float
) -> Pair:
    """The experts as served. rows: each one's tokens, [n, hidden]; common: of the layer."""
    width, inner = gate_up.shape[2], down.shape[2]
    hidden = torch.stack([blended(x, common.hessian, way.prior(len(x), width), way.even) for x in rows])
    upper = quantized(gate_up, hidden, way).dequantized()
    del hidden
    hessians, targets = [], []
    for e, x in enumerate(rows):
        exact = deepseek_v4.activation(F.linear(x, gate_up[e]), limit)
        sample = deepseek_v4.activation(F.linear(common.sample, gate_up[e]), limit)
        of_all = gptq.gram(sample) / len(sample)
        if way.target:
            served = deepseek_v4.activation(F.linear(x, upper[e]), limit)
            targets.append(undoing(down[e], exact, served, way))
            exact = served
        hessians.append(blended(exact, of_all, way.prior(len(x), inner), way.even))
    lower = quantized(torch.stack(targets) if targets else down, torch.stack(hessians), way).dequantized()
    return upper, lower


def blended(x: Tensor, everything: Tensor, tokens: float, even: bool) -> Tensor:
    if even and len(x):
        everything = everything * (x.float().square().sum() / len(x) / everything.diagonal().sum())
    return (gptq.gram(x) + tokens * everything) / max(len(x) + tokens, 1)


def undoing(down: Tensor, exact: Tensor, served: Tensor, way: Way) -> Tensor:
    """The w2 whose output from the served inputs is nearest to w2's own from the exact ones: [hidden, inner] f32."""
    h = gptq.gram(served) / max(len(served), 1)
    across = (exact.float() - served.float()).mT @ served.float() / max(len(served), 1)
    damped = h + way.target_dampening * h.diagonal().mean() * torch.eye(len(h), device=h.device)
    return down.float() + way.target * down.float() @ torch.linalg.solve(damped, across.mT).mT


def quantized(weights: Tensor, hessians: Tensor, way: Way) -> gptq.Quantized:
    share = way.dampening or 0.0
    damp = gptq.damp_of(hessians, share).unsqueeze(-1)
    scale = way.scales(weights, hessians.diagonal(dim1=-2, dim2=-1) + damp * way.damped_scales)
    if way.dampening is None:
        return gptq.round_to_nearest(weights, scale)
    found = gptq.gptq(weights, hessians, scale, way.dampening)
    for _ in range(way.passes):
        found = descended(weights, found, hessians, way.dampening)
    if way.refit:
        found = {"step": gptq.refit, "solved": solved}[way.refit](weights, found, hessians, share)
    return found


def dampened(hessians: Tensor, dampening: float) -> Tensor:
    return hessians + torch.diag_embed(gptq.damp_of(hessians, dampening).unsqueeze(-1).expand(hessians.shape[:2]))


def solved(weights: Tensor, found: gptq.Quantized, hessians: Tensor, dampening: float) -> gptq.Quantized:
    """gptq.refit to the end: the groups' scales from the normal equations of every row."""
    hessians = dampened(hessians, dampening)
    codes = found.codes.float()
    count = codes.shape[-1] // INT4_GROUP
    grouped = (torch.matmul(weights.float(), hessians) * codes).unflatten(-1, (count, INT4_GROUP)).sum(-1)
    normal = torch.empty(*grouped.shape, count, device=codes.device)
    for g in range(count):
        part = slice(g * INT4_GROUP, (g + 1) * INT4_GROUP)
        across = torch.matmul(codes[..., part], hessians[:, part]) * codes
        normal[..., g, :] = across.unflatten(-1, (count, INT4_GROUP)).sum(-1)
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-6 * diagonal.mean(-1, keepdim=True)
    scale = torch.linalg.solve(normal, grouped)
    grown = scale / found.scale.float()
    usable = scale.isfinite() & (grown >= 0.5) & (grown <= 2)
    return gptq.Quantized(found.codes, torch.where(usable, scale, found.scale.float()).to(torch.bfloat16))


def descended(weights: Tensor, found: gptq.Quantized, hessians: Tensor, dampening: float) -> gptq.Quantized:
    """One pass of coordinate descent: each code in turn the best one beside all others."""
    h = dampened(hessians, dampening)
    steps = found.scale.float().repeat_interleave(INT4_GROUP, -1)
    codes = found.codes.float()
    left = weights.float() - codes * steps
    for start in range(0, codes.shape[-1], INT4_GROUP):
        end = start + INT4_GROUP
        pull, block = torch.matmul(left, h[..., start:end]), h[:, start:end, start:end]
        for k in range(INT4_GROUP):
            at = start + k
            wanted = codes[..., at] * steps[..., at] + pull[..., k] / block[:, None, k, k].clamp_min(1e-30)
            code = (wanted / steps[..., at]).round().clamp(-8, 7)
            change = (codes[..., at] - code) * steps[..., at]
            codes[..., at] = code
            left[..., at] += change
            pull += change.unsqueeze(-1) * block[:, None, k]
    return gptq.Quantized(codes.to(torch.int8), found.scale)
