"""What the artifact must hold, worked out a second time for verify, and how far a quantized matrix is from its source.

Nothing here is shared with conversion.py, codec.py and gptq.py, which wrote the artifact: a fault there must not hide
itself. Everything is a function of stored bytes, and runs at about 1 GB/s of them a core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from v4forge.checkpoint.layout import stored_name
from v4forge.checkpoint.recipe import Rule
from v4forge.verification.tolerances import COLUMN_SHARE, TOLERATED_ROWS

Parts = Mapping[str, Tensor]
FP4_GROUP, FP8_BLOCK, INT4_GROUP = 32, 128, 128
SAMPLED_ROWS = 8  # of so many rows one is looked at for statistics of codes
ROWS = 512  # of a matrix at a time on a CPU, whose temporaries then stay where the last ones were
CPU = torch.device("cpu")


@cache
def _powers(device: torch.device = CPU) -> Tensor:
    return torch.tensor([*(2.0 ** (byte - 127) for byte in range(255)), math.nan], dtype=torch.float64).to(device)


def powers_of_two(scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """E8M0 bytes b -> 2^(b - 127), byte 255 -> NaN (OCP MX 1.0)."""
    byte = scale.view(torch.uint8)
    return _powers(scale.device).to(dtype).index_select(0, byte.flatten().int()).view(byte.shape)


def e2m1(code: Tensor) -> Tensor:
    """Codes 0..15 -> f32: a sign, two bits of exponent with bias 1, one bit of mantissa, subnormals (OCP MX 1.0)."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, (code & 1).float()
    magnitude = torch.where(exponent > 0, torch.ldexp(1 + mantissa / 2, exponent.int() - 1), mantissa / 2)
    return torch.where(sign > 0, -magnitude, magnitude)


@cache
def _fp4_pairs(device: torch.device = CPU) -> Tensor:
    """The two values of every byte, the low nibble's first, as a pair of bf16: [256] i32."""
    byte = torch.arange(256)
    return torch.stack((e2m1(byte & 15), e2m1(byte >> 4)), -1).bfloat16().view(torch.int32).flatten().to(device)


def _fp4(parts: Parts) -> Tensor:
    """weight: [out, in/2] i8, scale: [out, in/32] e8m0 -> [out, in] bf16."""
    byte = parts["weight"].view(torch.uint8)
    pairs = _fp4_pairs(byte.device).index_select(0, byte.flatten().int()).view(torch.bfloat16)
    scale = powers_of_two(parts["scale"], torch.bfloat16)
    return pairs.view(*scale.shape, FP4_GROUP).mul_(scale.unsqueeze(-1)).flatten(1)


def _fp8(parts: Parts) -> Tensor:
    """weight: [out, in] e4m3, scale: one e8m0 per 128x128 block -> [out, in] bf16."""
    weight = parts["weight"]
    row, column = (torch.arange(n) // FP8_BLOCK for n in weight.shape)
    return weight.bfloat16().mul_(powers_of_two(parts["scale"], torch.bfloat16)[row][:, column])


# (format upstream, format in the artifact) -> the artifact's parts
EXPECTED: dict[tuple[str, str], Callable[[Parts], Parts]] = {
    ("fp8", "fp8-ct"): lambda p: {"weight": p["weight"], "weight_scale": powers_of_two(p["scale"])},
    ("fp4", "mxfp4"): lambda p: {
        "weight_packed": p["weight"].view(torch.uint8),
        "weight_scale": p["scale"].view(torch.uint8),
    },
    ("fp8", "bf16"): lambda p: {"": _fp8(p)},
    ("fp4", "bf16"): lambda p: {"": _fp4(p)},
    ("bf16", "f32"): lambda p: {"": p[""].float()},
    ("bf16", "bf16"): lambda p: p,
    ("f32", "f32"): lambda p: p,
    ("int", "int"): lambda p: p,
}
ALIKE = {("bf16", "f32"), ("bf16", "bf16"), ("f32", "f32"), ("int", "int")}  # element by element


def expected(name: str, rule: Rule, parts: Parts) -> dict[str, Tensor]:
    """The artifact's stored tensors of an upstream logical tensor that is not quantized."""
    return {stored_name(name, part): t for part, t in EXPECTED[rule.source, rule.artifact](parts).items()}


def fault(fmt: str, parts: Parts, experts: int) -> str:
    """What makes a stored tensor unusable whatever the source says, "" for none. experts: how many there are."""
    if fmt == "int4":
        return ""
    if fmt == "mxfp4":
        # 6 x 2^125 is the last that is finite in BF16
        high = int(parts["weight_scale"].max())
        return f"has the E8M0 scale byte {high}, at most 252 decodes exactly" if high > 252 else ""
    if fmt == "int":
        table = parts[""]
        low, high = int(table.min()), int(table.max())
        bad = low if low < 0 else high
        return f"routes to expert {bad}, there are 0 to {experts - 1}" if low < 0 or high >= experts else ""
    if fmt == "fp8-ct":
        scale = parts["weight_scale"]
        mantissa, exponent = torch.frexp(scale)
        # the range in which every E4M3 value times the scale is exact in BF16
        if not bool(((mantissa == 0.5) & (exponent >= -123) & (exponent <= 120)).all()):
            return "has a weight_scale that is not a power of two from 2^-124 to 2^119"
        # 0x7F and 0xFF are the two NaN; as signed bytes without the sign bit they are the greatest
        return "holds NaN" if bool((parts["weight"].view(torch.uint8) & 0x7F).max() == 0x7F) else ""
    return "" if bool(parts[""].isfinite().all()) else "holds NaN or Inf"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes: -0 is not 0, and NaN is NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = _bits(a), _bits(b)
    words = len(a) - len(a) % 8
    return torch.equal(a[:words].view(torch.int64), b[:words].view(torch.int64)) and torch.equal(a[words:], b[words:])


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def difference(found: Tensor, wanted: Tensor, offset: int = 0) -> str:
    """How many values differ and the first of them; `offset`: where in its tensor the compared piece starts."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"{found.dtype} {list(found.shape)} instead of {wanted.dtype} {list(wanted.shape)}"
    unequal = (_bits(found).view(-1, found.element_size()) != _bits(wanted).view(-1, found.element_size())).any(1)
    where = int(unequal.nonzero()[0])
    values = found.reshape(-1)[where].item(), wanted.reshape(-1)[where].item()
    of = f"{int(unequal.sum())} of {found.numel()} values"
    return f"{of}, first at {offset + where}: {values[0]} instead of {values[1]}"


@dataclass(frozen=True)
class Matrix:
    """An INT4 matrix Q and, where there is one, its source W."""

    stated: tuple[int, ...]  # its weight_shape
    scales_ok: bool  # finite and not zero; codes of a negative scale are negated
    distinct: int  # codes in use, counted no further than over some rows if these use all that can be asked for
    error: float = 0.0  # ||W - Q|| / ||W||
    rows: tuple[float, float] = (1.0, 1.0)  # least and greatest slope of a row, but for TOLERATED_ROWS at either end
    columns: tuple[float, float] = (1.0, 1.0)  # least and greatest slope of a column of groups that is not faint
    moved: int = 0  # of `codes` sampled ones, those that are not the nearest at their scale
    codes: int = 0


def compared(parts: Parts, source: Parts) -> Matrix:
    """An INT4 g128 matrix [out, in] beside its FP4 source, both as stored; `source` may be empty.

    Q is code times scale, before the rounding to BF16 of a server, which is 30 times finer than the bounds it is held
    to.
    """
    return all_compared([parts], [source])[0]


def all_compared(parts: Sequence[Parts], sources: Sequence[Parts], device: torch.device = CPU) -> list[Matrix]:
    """Each as `compared`: matrices of one shape, with sources or all without. On `device`, which is waited for once."""

    def stacked(of: Sequence[Parts], part: str) -> Tensor:
        if len(of) == 1 and device == CPU:
            return of[0][part].unsqueeze(0)
        return torch.stack([each[part].to(device, non_blocking=True) for each in of])

    codes, scale = stacked(parts, "weight_packed").view(torch.uint8), stacked(parts, "weight_scale")
    figures = [(scale.isfinite() & (scale != 0)).all(-1).all(-1), _distinct(codes)]
    if sources[0]:
        fp4, exponent = (stacked(sources, part).view(torch.uint8) for part in ("weight", "scale"))
        step = scale.double()
        rows = (each.flatten(0, 1) for each in (fp4, codes, exponent, step))
        qw, ww, qq = (each.view(scale.shape) for each in _by_group(*rows))
        figures += [ww.sum((1, 2)), (qq - 2 * qw + ww).sum((1, 2))]
        figures += [*_ends(_slopes(qw, ww, 2), TOLERATED_ROWS), *_least_and_greatest(_slopes(qw, ww, 1), _counted(ww))]
        figures.append(_moved(codes, step, fp4, exponent))
    told = torch.stack([figure.double() for figure in figures], 1).tolist()
    shapes = [tuple(each["weight_shape"].tolist()) for each in parts]
    return [
        _matrix(stated, codes[0, ::SAMPLED_ROWS].numel() * 2, *each) for stated, each in zip(shapes, told, strict=True)
    ]


def _matrix(stated: tuple[int, ...], codes: int, fine: float, distinct: float, *rest: float) -> Matrix:
    """Of all_compared's figures."""
    if not rest:
        return Matrix(stated, bool(fine), int(distinct))
    energy, squared, *slopes, moved = rest
    error = math.sqrt(max(squared, 0.0) / energy) if energy > 0 else math.nan if squared else 0.0
    rows, columns = (slopes[0], slopes[1]), (slopes[2], slopes[3])
    return Matrix(stated, bool(fine), int(distinct), error, rows, columns, int(moved), codes)


def _by_group(fp4: Tensor, codes: Tensor, exponent: Tensor, step: Tensor) -> list[Tensor]:
    """<q, w>, <w, w> and <q, q> of each group of 128, [rows, groups] f64 each.

    Bytes of both hold two codes, in the same order: one table over both bytes has their products, which are added in
    groups of 32."""
    at_a_time = ROWS if codes.device == CPU else len(codes)
    found = []
    for weight, code, power, scale in zip(*(t.split(at_a_time) for t in (fp4, codes, exponent, step)), strict=True):
        both = torch.stack((weight, code), -1).view(torch.uint16).int().view(-1, FP4_GROUP // 2)
        sums = F.embedding_bag(both, _products(codes.device), mode="sum").double()
        sums, factor = sums.view(*power.shape, -1), powers_of_two(power, torch.float64)
        per_group = (*scale.shape, INT4_GROUP // FP4_GROUP)
        qw = (sums[..., 0] * factor).view(per_group).sum(-1) * scale
        ww = (sums[..., 1] * factor.square()).view(per_group).sum(-1)
        found.append((qw, ww, sums[..., 2].view(per_group).sum(-1) * scale.square()))
    return [torch.cat(each) for each in zip(*found, strict=True)]


def _slopes(qw: Tensor, ww: Tensor, along: int) -> Tensor:
    """Means of <q, w> / <w, w> over the groups of 128 `along` rows (2) or columns (1), each weighted by its ||w||: a
    group that is faint beside the others hardly counts, and no single large weight decides. qw, ww: [matrices, out,
    groups]; 1.0 where the source has zeros only.
    """
    norm = ww.sqrt()
    total = norm.sum(along)
    return torch.where(total > 0, torch.where(ww > 0, qw / norm, 0.0).sum(along) / total, 1.0)


def _counted(ww: Tensor) -> Tensor:
    """Which columns of groups carry enough of their matrix to be judged, [matrices, groups] bool. ww: [matrices, out,
    groups]."""
    carried = ww.sqrt().sum(1)
    return carried >= COLUMN_SHARE * carried.mean(-1, keepdim=True)


def _ends(values: Tensor, tolerated: float) -> tuple[Tensor, Tensor]:
    """Least and greatest of the last dimension, but for a share of them at either end."""
    left_out = int(values.shape[-1] * tolerated)
    ordered = values.sort(-1).values
    return ordered[..., left_out], ordered[..., -1 - left_out]


def _least_and_greatest(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    return values.where(counted, torch.inf).amin(-1), values.where(counted, -torch.inf).amax(-1)


@cache
def _products(device: torch.device = CPU) -> Tensor:
    """[FP4 byte + 256 * INT4 byte, :] -> sums over the two pairs of codes of (w c, w^2, c^2), and 0; f32, exact."""
    pair = torch.arange(1 << 16)
    sums = torch.zeros(1 << 16, 4)
    for shift in (0, 4):
        w, c = e2m1(pair >> shift & 15), (pair >> (8 + shift) & 15).float() - 8
        sums += torch.stack((w * c, w * w, c * c, torch.zeros_like(w)), -1)
    return sums.to(device)


def tables(device: torch.device) -> None:
    """Makes what `compared` looks up on a GPU, before several streams do."""
    for table in (_powers, _fp4_pairs, _products):
        table(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _distinct(codes: Tensor) -> Tensor:
    """How many of the 16 codes each matrix uses. codes: [matrices, out, in/2] u8, two a byte."""
    if codes.device == CPU:
        counts = [torch.bincount(each[::SAMPLED_ROWS].flatten(), minlength=256) for each in codes]
        found = _codes_of(torch.stack(counts) > 0)
        if bool((found == 16).all()):
            return found
        return _codes_of(torch.stack([torch.bincount(each.flatten(), minlength=256) for each in codes]) > 0)
    used = torch.zeros(len(codes), 256, dtype=torch.bool, device=codes.device)  # for bincount would wait
    used.scatter_(1, codes.flatten(1).long(), True)
    return _codes_of(used)


def _codes_of(bytes_used: Tensor) -> Tensor:
    """bytes_used: [matrices, 256] bool."""
    by_code = bytes_used.view(-1, 16, 16)
    return (by_code.any(1) | by_code.any(2)).sum(1)


def _moved(codes: Tensor, step: Tensor, fp4: Tensor, exponent: Tensor) -> Tensor:
    """How many codes of some rows of each matrix are not the nearest ones at their scales."""
    some_codes, some_steps, weight, scale = (
        each[:, ::SAMPLED_ROWS].flatten(0, 1) for each in (codes, step, fp4, exponent)
    )
    grouped = _fp4({"weight": weight, "scale": scale}).float().unflatten(-1, (-1, INT4_GROUP))
    nearest = (grouped / some_steps.float().unsqueeze(-1)).round_().clamp_(-8, 7).flatten(1)
    found = torch.stack((some_codes & 15, some_codes >> 4), -1).flatten(1).float() - 8
    return (nearest != found).view(len(codes), -1).sum(1)
