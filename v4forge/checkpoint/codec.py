"""Number formats of DeepSeek-V4 checkpoints: FP4, FP8 and INT4 weights to BF16 and back.

formats.py says which tensors store a weight. Every decode to BF16 here is exact, or refused: an FP4 or FP8 value times
a power of two has at most 4 significant bits, so only the exponent range of BF16 can lose something, and the E8M0 bytes
for which it would are errors.

OCP Microscaling Formats (MX) v1.0 defines E2M1, E4M3 and E8M0; INT4 is compressed-tensors' `pack-quantized`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from v4forge.checkpoint.formats import FP4_GROUP, FP8_BLOCK, INT4_GROUP, TensorSpec

DTYPES = {
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes by the low three bits of a code; bit 3 is the sign
E2M1_MAX, E4M3_MAX = 6.0, 448.0
# E8M0 bytes b (scale 2^(b - 127)) for which every finite value of the format is exact in BF16: its largest finite
# number is below 2^128, its smallest subnormal 2^-133. FP4: 6 x 2^125 fits, 0.5 x 2^-127 too. FP8: 448 x 2^119 fits,
# 2^-9 x 2^-124 is 2^-133.
FP4_SCALES, FP8_SCALES = (0, 252), (3, 246)


class CodecError(ValueError):
    """A stored tensor that does not decode exactly; the message says which byte or value."""


def spec_of(tensor: Tensor) -> TensorSpec:
    """How the tensor is stored as it is."""
    return TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def e8m0_to_f32(scale: Tensor) -> Tensor:
    """2^(b - 127) for E8M0 bytes, f32, exact including the subnormal 2^-127; byte 255 becomes NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def _check_scales(scale: Tensor, allowed: tuple[int, int]) -> None:
    byte = scale.view(torch.uint8)
    low, high = allowed
    if byte.numel() and (int(byte.min()) < low or int(byte.max()) > high):
        bad = byte[(byte < low) | (byte > high)][0].item()
        what = "NaN" if bad == 255 else f"2^{bad - 127}"
        raise CodecError(f"E8M0 scale byte {bad} ({what}) is outside {low}..{high}, where BF16 is exact")


@lru_cache
def e2m1_values(device: torch.device) -> Tensor:
    """The values of the 16 E2M1 codes, [16] f32; made once a device, because a copy to one waits for it."""
    return torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32, device=device)


@lru_cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """The two values of every byte of codes, the low nibble's first, as a pair of bf16: [256] i32."""
    byte = torch.arange(256, device=device)
    pairs = e2m1_values(device)[torch.stack((byte & 15, byte >> 4), dim=-1)]
    return pairs.to(torch.bfloat16).view(torch.int32).flatten()


def decode_fp4(weight: Tensor, scale: Tensor) -> Tensor:
    """weight: [..., in/2], two E2M1 codes a byte, low nibble first; scale: [..., in/32] e8m0 -> [..., in] bf16.

    Upstream's dtypes or the bytes of compressed-tensors' `mxfp4-pack-quantized`, which are the same ones.
    """
    _check_scales(scale, FP4_SCALES)
    pairs = _e2m1_pairs(weight.device)[weight.view(torch.uint8).int()].view(torch.bfloat16)
    # a product of BF16 numbers that is itself one is exact
    return pairs.unflatten(-1, (-1, FP4_GROUP)).mul_(e8m0_to_f32(scale).to(torch.bfloat16).unsqueeze(-1)).flatten(-2)


def decode_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """weight: [out, in] e4m3; scale: one per 128x128 block, [ceil(out/128), ceil(in/128)] e8m0 or f32 -> bf16."""
    if scale.dtype == torch.float32:
        scale = f32_to_e8m0(scale)
    _check_scales(scale, FP8_SCALES)
    if bool((weight.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise CodecError("the E4M3 weight holds NaN")
    out, inp = weight.shape
    by_row = e8m0_to_f32(scale).repeat_interleave(FP8_BLOCK, 1)[:, :inp]
    rows = by_row.repeat_interleave(FP8_BLOCK, 0)[:out]
    return (weight.float() * rows).to(torch.bfloat16)


def f32_to_e8m0(scale: Tensor) -> Tensor:
    """The E8M0 form of f32 powers of two; raises CodecError for any other value."""
    exact = scale.to(torch.float8_e8m0fnu)
    if not torch.equal(exact.float(), scale):
        raise CodecError("the F32 scale holds a value that is not a power of two")
    return exact


def decode_int4(weight_packed: Tensor, weight_scale: Tensor, weight_shape: Tensor) -> Tensor:
    """weight_packed: [out, in/8] i32; weight_scale: [out, in/128] bf16; weight_shape: [2] i64 -> [out, in] bf16."""
    codes = unpack_int4(weight_packed, weight_shape)
    return dequantize_int4(codes, weight_scale)


@lru_cache
def _int4_pairs(device: torch.device) -> Tensor:
    """The two codes of every byte of packed ones, as a pair of bf16: [256] i32."""
    byte = torch.arange(256, device=device)
    return (torch.stack((byte & 15, byte >> 4), dim=-1) - 8).to(torch.bfloat16).view(torch.int32).flatten()


def decode_int4_stack(weight_packed: Tensor, weight_scale: Tensor, weight_shape: Tensor) -> Tensor:
    """`decode_int4` of many matrices of one shape at once. [n, out, in/8] i32, [n, out, in/128] bf16, [n, 2] i64.

    Raises CodecError for a scale that is not finite and a weight_shape that is not the matrix's.
    """
    packed, shape = weight_packed.view(torch.uint8), (weight_packed.shape[1], 8 * weight_packed.shape[2])
    if not bool((weight_shape == weight_shape.new_tensor(shape)).all()):
        raise CodecError(f"weight_shape is not {list(shape)}")
    if not bool(weight_scale.isfinite().all()):
        raise CodecError("the scale holds NaN or Inf")
    codes = _int4_pairs(packed.device)[packed.int()].view(torch.bfloat16)
    return codes.unflatten(-1, (-1, INT4_GROUP)).mul_(weight_scale.unsqueeze(-1)).flatten(-2)


def unpack_int4(weight_packed: Tensor, weight_shape: Tensor) -> Tensor:
    """The signed codes -8..7, [out, in] i8."""
    byte = weight_packed.view(torch.uint8)
    nibbles = torch.stack((byte & 15, byte >> 4), dim=-1).flatten(-2)
    return nibbles.view(torch.int8)[:, : int(weight_shape[1])] - 8


def dequantize_int4(codes: Tensor, scale: Tensor) -> Tensor:
    """codes: [..., out, in] i8; scale: [..., out, in/128] bf16 -> code times scale, rounded to bf16, as served."""
    grouped = codes.unflatten(-1, (-1, INT4_GROUP)).float() * scale.float().unsqueeze(-1)
    return grouped.to(torch.bfloat16).flatten(-2)


def pack_int4(codes: Tensor) -> Tensor:
    """codes: [..., in] i8 in -8..7 -> [..., in/8] i32, offset 8, the first code in the low bits."""
    nibbles = (codes + 8).view(torch.uint8)
    return (nibbles[..., ::2] | nibbles[..., 1::2] << 4).view(torch.int32)


def encode_int4(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """codes: [..., out, in] i8 in -8..7; scale: [..., out, in/128] -> the tensors of a `pack-quantized` weight."""
    shape = torch.tensor(codes.shape[-2:], dtype=torch.int64)
    return {"weight_packed": pack_int4(codes), "weight_scale": scale.to(torch.bfloat16), "weight_shape": shape}


def _ceil_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    return torch.where(mantissa == 0.5, exponent - 1, exponent)


def power_of_two_scale(amax: Tensor, largest: float, allowed: tuple[int, int]) -> Tensor:
    """The smallest E8M0 scale with amax / scale <= largest, as bytes, clamped to those that decode exactly."""
    return (_ceil_log2(amax / largest) + 127).clamp(*allowed).to(torch.uint8).view(torch.float8_e8m0fnu)


def round_to_e2m1(x: Tensor) -> Tensor:
    """The code 0..15 of the nearest E2M1 value, ties to even, saturating; x: f32 -> u8."""
    levels = e2m1_values(x.device)[:8]
    midpoints = (levels[1:] + levels[:-1]) / 2
    magnitude = x.abs()
    above = torch.bucketize(magnitude, midpoints)  # a tie stays at the lower level ...
    tie = (above < 7) & (magnitude == midpoints[above.clamp(max=6)])
    code = torch.where(tie & (above % 2 == 1), above + 1, above)  # ... unless the lower one is odd
    return (code | (torch.signbit(x).long() << 3)).to(torch.uint8)


def encode_fp4(weight: Tensor) -> dict[str, Tensor]:
    """weight: [out, in], in divisible by 32 -> upstream's `weight` [out, in/2] i8 and `scale` [out, in/32] e8m0."""
    groups = weight.float().unflatten(-1, (-1, FP4_GROUP))
    scale = power_of_two_scale(groups.abs().amax(-1), E2M1_MAX, FP4_SCALES)
    code = round_to_e2m1(groups / e8m0_to_f32(scale).unsqueeze(-1)).flatten(1)
    return {"weight": (code[:, ::2] | code[:, 1::2] << 4).view(torch.int8), "scale": scale}


def encode_fp8(weight: Tensor) -> dict[str, Tensor]:
    """weight: [out, in] -> upstream's `weight` e4m3 and `scale` [ceil(out/128), ceil(in/128)] e8m0."""
    out, inp = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -inp % FP8_BLOCK, 0, -out % FP8_BLOCK))
    blocks = padded.unflatten(0, (-1, FP8_BLOCK)).unflatten(-1, (-1, FP8_BLOCK))
    scale = power_of_two_scale(blocks.abs().amax((1, 3)), E4M3_MAX, FP8_SCALES)
    scaled = blocks / e8m0_to_f32(scale)[:, None, :, None]
    return {"weight": scaled.flatten(2).flatten(0, 1)[:out, :inp].to(torch.float8_e4m3fn), "scale": scale}


# By format of the recipe: the stored tensors of formats.PARTS -> the logical one.
DECODERS: dict[str, Callable[..., Tensor]] = {
    "fp4": decode_fp4,
    "mxfp4": decode_fp4,
    "fp8": decode_fp8,
    "fp8-ct": decode_fp8,
    "int4": decode_int4,
    **dict.fromkeys(("bf16", "f32", "int"), lambda tensor: tensor),
}
