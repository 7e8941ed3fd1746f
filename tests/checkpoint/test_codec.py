"""v4forge.checkpoint.codec against decoders written from the definitions of the formats, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from v4forge.checkpoint import codec, formats

FP4_EXACT, FP8_EXACT = range(0, 253), range(3, 247)


def test_every_dtype_has_the_bytes_that_torch_gives_it() -> None:
    assert {name: dtype.itemsize for name, dtype in codec.DTYPES.items()} == formats.ITEM_BYTES


def e2m1(code: int) -> float:
    """OCP MX v1.0: 1 sign, 2 exponent (bias 1), 1 mantissa bit."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def e4m3(code: int) -> float:
    """OCP FP8: 1 sign, 4 exponent (bias 7), 3 mantissa bits; S.1111.111 is NaN, there is no infinity."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if sign else magnitude


E2M1_TABLE = np.array([e2m1(c) for c in range(16)])
E4M3_TABLE = np.array([e4m3(c) for c in range(256)])


def bf16_exact(values: np.ndarray) -> bool:
    """Whether every float64 has at most 8 significant bits, lies below 2^128 and on the grid of 2^-133."""
    mantissa, _ = np.frexp(values)
    in_range = np.abs(values) < 2.0**128
    on_grid = np.ldexp(values, 133) == np.floor(np.ldexp(values, 133))
    return bool((in_range & on_grid & (np.ldexp(mantissa, 8) == np.floor(np.ldexp(mantissa, 8)))).all())


def as_e8m0(byte: np.ndarray | list) -> torch.Tensor:
    return torch.tensor(np.asarray(byte, dtype=np.uint8)).view(torch.float8_e8m0fnu)


def as_e4m3(byte: np.ndarray | list) -> torch.Tensor:
    return torch.tensor(np.asarray(byte, dtype=np.uint8)).view(torch.float8_e4m3fn)


def assert_same(decoded: torch.Tensor, expected: np.ndarray) -> None:
    assert decoded.dtype == torch.bfloat16
    got = decoded.double().numpy()
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def test_fp4_decodes_exactly_for_every_byte_and_every_exact_scale() -> None:
    byte = np.tile(np.arange(256, dtype=np.uint8), (len(FP4_EXACT), 1))  # 16 groups of 16 bytes
    scale = np.repeat(np.array(FP4_EXACT, dtype=np.uint8)[:, None], 16, axis=1)
    codes = np.stack((byte & 15, byte >> 4), axis=-1).reshape(len(FP4_EXACT), 512)
    expected = E2M1_TABLE[codes] * 2.0 ** (scale.astype(float).repeat(32, axis=1) - 127)
    assert bf16_exact(expected)
    assert_same(codec.decode_fp4(torch.tensor(byte).view(torch.int8), as_e8m0(scale)), expected)


def test_upstream_s_fp4_bytes_are_those_of_compressed_tensors_mxfp4() -> None:
    """Code for code and scale for scale, the low nibble first: its own unpacking gives what ours does."""
    byte = torch.arange(256, dtype=torch.uint8).repeat(len(FP4_EXACT), 1)
    scale = torch.tensor(FP4_EXACT, dtype=torch.uint8).unsqueeze(1).repeat(1, 16)
    values = unpack_fp4_from_uint8(byte, len(FP4_EXACT), 512, torch.float32).unflatten(-1, (16, 32))
    theirs = (values * decompress_mx_scale(scale).float().unsqueeze(-1)).flatten(-2)
    assert torch.equal(codec.DECODERS["mxfp4"](byte, scale).float(), theirs)
    upstream = byte.view(torch.int8), scale.view(torch.float8_e8m0fnu)
    assert torch.equal(codec.DECODERS["fp4"](*upstream).float(), theirs)


def test_fp8_decodes_exactly_for_every_code_and_every_exact_scale() -> None:
    codes = np.arange(256, dtype=np.uint8)
    codes[[0x7F, 0xFF]] = 0
    block = codes.reshape(2, 128)
    scales = np.array(FP8_EXACT, dtype=np.uint8)[None]
    weight = np.tile(block, (1, len(FP8_EXACT)))
    expected = E4M3_TABLE[weight] * 2.0 ** (scales.astype(float).repeat(128, axis=1) - 127)
    assert bf16_exact(expected)
    assert_same(codec.decode_fp8(as_e4m3(weight), as_e8m0(scales)), expected)


@pytest.mark.parametrize("byte", [253, 254, 255])
def test_fp4_refuses_the_scales_for_which_bf16_is_not_exact(byte: int) -> None:
    assert byte == 255 or not bf16_exact(E2M1_TABLE * 2.0 ** (byte - 127))
    scale = np.full((3, 2), 127)
    scale[2, 1] = byte
    with pytest.raises(codec.CodecError, match=f"E8M0 scale byte {byte} "):
        codec.decode_fp4(torch.zeros(3, 32, dtype=torch.int8), as_e8m0(scale))


@pytest.mark.parametrize("byte", [0, 1, 2, *range(247, 256)])
def test_fp8_refuses_the_scales_for_which_bf16_is_not_exact(byte: int) -> None:
    assert byte == 255 or not bf16_exact(np.nan_to_num(E4M3_TABLE) * 2.0 ** (byte - 127))
    with pytest.raises(codec.CodecError, match=f"E8M0 scale byte {byte} "):
        codec.decode_fp8(torch.zeros(130, 128).to(torch.float8_e4m3fn), as_e8m0([[127], [byte]]))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_refuses_a_nan_code(code: int) -> None:
    byte = np.zeros((4, 4))
    byte[3, 2] = code
    with pytest.raises(codec.CodecError, match="NaN"):
        codec.decode_fp8(as_e4m3(byte), as_e8m0([[127]]))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_fp8_blocks_end_at_odd_edges(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    scale = rng.integers(3, 247, (-(-rows // 128), -(-columns // 128)), dtype=np.uint8)
    i, j = np.indices(codes.shape)
    expected = E4M3_TABLE[codes] * 2.0 ** (scale[i // 128, j // 128].astype(float) - 127)
    assert_same(codec.decode_fp8(as_e4m3(codes), as_e8m0(scale)), expected)
    as_f32 = torch.tensor(2.0 ** (scale.astype(np.float64) - 127), dtype=torch.float32)
    assert_same(codec.decode_fp8(as_e4m3(codes), as_f32), expected)


@pytest.mark.parametrize("scale", [3.0, 0.0, -1.0, float("nan"), float("inf"), 1 + 2**-20])
def test_an_f32_scale_that_is_no_power_of_two_is_refused(scale: float) -> None:
    with pytest.raises(codec.CodecError, match="power of two"):
        codec.decode_fp8(as_e4m3(np.zeros((4, 4))), torch.tensor([[scale]]))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_int4_codes_are_nibbles_offset_by_8_lowest_first(rows: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (rows, 128 * groups), dtype=np.int8)
    codes[0, :4] = [-8, 7, 7, -8]
    codes[-1, -2:] = [-8, 7]  # the sign bit of a word
    scale = torch.tensor(rng.uniform(1e-4, 1, (rows, groups)), dtype=torch.bfloat16)
    parts = codec.encode_int4(torch.tensor(codes), scale)
    assert {k: codec.spec_of(v) for k, v in parts.items()} == dict(formats.PARTS["int4"](codes.shape))
    words = parts["weight_packed"].numpy().view(np.uint32)
    unpacked = np.array(
        [[(int(words[r, c // 8]) >> 4 * (c % 8) & 15) - 8 for c in range(codes.shape[1])] for r in range(rows)]
    )
    np.testing.assert_array_equal(unpacked, codes)
    for unpack in (codec.unpack_int4, lambda packed, shape: unpack_from_int32(packed, 4, torch.Size(shape.tolist()))):
        np.testing.assert_array_equal(unpack(parts["weight_packed"], parts["weight_shape"]).numpy(), codes)
    product = codes * scale.double().numpy().repeat(128, axis=1)
    expected = torch.tensor(product).to(torch.bfloat16)  # 4 x 8 bits of product fit F32: one rounding
    assert torch.equal(codec.decode_int4(**parts), expected)


@pytest.mark.parametrize("code", range(-8, 8))
def test_an_int4_matrix_of_one_code_comes_back(code: int) -> None:
    codes = torch.full((3, 128), code, dtype=torch.int8)
    parts = codec.encode_int4(codes, torch.ones(3, 1))
    assert torch.equal(codec.decode_int4(**parts), codes.bfloat16())


def test_stacks_of_matrices_are_coded_like_each_of_them() -> None:
    rng = np.random.default_rng(3)
    codes = torch.tensor(rng.integers(-8, 8, (2, 3, 5, 256), dtype=np.int8))
    packed = codec.pack_int4(codes)
    for i, j in np.ndindex(2, 3):
        assert torch.equal(packed[i, j], pack_to_int32(codes[i, j], 4))
    scale = torch.tensor(rng.uniform(1e-4, 1, (2, 3, 5, 2)), dtype=torch.bfloat16)
    served = codec.dequantize_int4(codes, scale)
    assert torch.equal(served[1, 2], codec.decode_int4(**codec.encode_int4(codes[1, 2], scale[1, 2])))
    byte = torch.tensor(rng.integers(0, 256, (4, 5, 48), dtype=np.uint8)).view(torch.int8)
    exponents = as_e8m0(rng.integers(*FP4_EXACT[:: len(FP4_EXACT) - 1], (4, 5, 3)))
    stacked = codec.decode_fp4(byte, exponents)
    assert all(torch.equal(stacked[e], codec.decode_fp4(byte[e], exponents[e])) for e in range(4))


def brute_force_e2m1(x: float) -> int:
    """The nearest code; of two at the same distance the one with an even mantissa."""
    magnitudes = E2M1_TABLE[:8]
    code = min(range(8), key=lambda c: (abs(magnitudes[c] - abs(x)), c & 1))
    return code | (8 if np.signbit(x) else 0)


@given(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=50))
@settings(deadline=None)
def test_e2m1_rounding_is_to_nearest(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert codec.round_to_e2m1(x).tolist() == [brute_force_e2m1(v) for v in values]


def test_e2m1_ties_go_to_even_and_neighbours_of_ties_do_not() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    x = torch.tensor([s * t for t in ties for s in (1.0, -1.0)], dtype=torch.float32)
    x = torch.cat((x, x.nextafter(torch.tensor(0.0)), x.nextafter(x * 2), torch.tensor([0.0, -0.0, 60.0, -60.0])))
    assert codec.round_to_e2m1(x).tolist() == [brute_force_e2m1(v) for v in x.double().tolist()]
    assert [E2M1_TABLE[c] for c in codec.round_to_e2m1(torch.tensor(ties)).tolist()] == [0, 1, 1, 2, 2, 4, 4]


def random_weight(rows: int, columns: int, seed: int, exponent: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, columns, generator=generator) * 3  # magnitudes over several octaves
    return torch.randn(rows, columns, generator=generator) * torch.exp2(spread) * 2.0**exponent


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-60, 60))
def test_fp4_encoding_is_within_half_a_step_and_never_saturates(seed: int, exponent: int) -> None:
    weight = random_weight(7, 96, seed, exponent)
    weight[0, :32] = 0
    weight[1, 0] = 6 * 2.0**exponent  # the largest code exactly
    weight[2, 0] = float(np.nextafter(np.float32(6 * 2.0**exponent), np.float32(np.inf)))  # a hair above it
    parts = codec.encode_fp4(weight)
    scale = parts["scale"].view(torch.uint8).double().sub(127).exp2().repeat_interleave(32, 1)
    y = weight.double().abs() / scale
    assert float(y.max()) <= 6
    busiest = y.unflatten(1, (-1, 32)).amax(-1)
    assert ((busiest > 3) | (busiest == 0)).all()  # half the scale would saturate
    step = torch.where(y < 2, 0.5, torch.where(y < 4, 1.0, 2.0))
    error = (codec.decode_fp4(**parts).double() - weight.double()).abs() / scale
    assert (error <= step / 2).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-60, 60))
def test_fp8_encoding_is_within_half_a_step_and_never_saturates(seed: int, exponent: int) -> None:
    weight = random_weight(130, 140, seed, exponent)
    weight[:128, :128].clamp_(-448 * 2.0**exponent, 448 * 2.0**exponent)
    weight[0, 0] = float(np.nextafter(np.float32(448 * 2.0**exponent), np.float32(np.inf)))
    weight[128:, 128:] = 0
    parts = codec.encode_fp8(weight)
    scale = parts["scale"].view(torch.uint8).double().sub(127).exp2()
    scale = scale.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :140]
    y = weight.double().abs() / scale
    assert float(y.max()) <= 448
    assert float(y[:128, :128].max()) > 224
    step = torch.exp2(torch.floor(torch.log2(y.clamp(min=2.0**-6))) - 3)
    error = (codec.decode_fp8(**parts).double() - weight.double()).abs() / scale
    assert (error <= step / 2).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_encoding_a_decoded_fp4_weight_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    byte = torch.tensor(rng.integers(0, 256, (5, 48), dtype=np.uint8)).view(torch.int8)
    values = codec.decode_fp4(byte, as_e8m0(rng.integers(20, 230, (5, 3))))
    assert torch.equal(codec.decode_fp4(**codec.encode_fp4(values)), values)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_encoding_a_decoded_fp8_weight_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (131, 129), dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    values = codec.decode_fp8(as_e4m3(codes), as_e8m0(rng.integers(20, 230, (2, 2))))
    assert torch.equal(codec.decode_fp8(**codec.encode_fp8(values)), values)
