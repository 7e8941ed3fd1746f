"""How DeepSeek-V4 checkpoints store a logical weight: which tensors, each with dtype and shape. codec.py decodes them.

Data and arithmetic of names and sizes, for all that plans and tells of a run without opening a tensor: no torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

FP4_GROUP = 32  # inputs that share one E8M0 scale
FP8_BLOCK = 128  # rows and columns of a block that share one scale
INT4_GROUP = 128  # inputs that share one BF16 scale

# Names of the safetensors format, https://github.com/huggingface/safetensors#format, and bytes of an element
ITEM_BYTES = {
    **dict.fromkeys(("F8_E8M0", "F8_E4M3", "F8_E5M2", "BOOL", "I8", "U8"), 1),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor: its dtype, a key of ITEM_BYTES, and its shape."""

    dtype: str
    shape: Shape

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


Parts = Mapping[str, TensorSpec]


def _fp8(suffix: str, dtype: str) -> Callable[[Shape], Parts]:
    return lambda s: {
        "weight": TensorSpec("F8_E4M3", s),
        suffix: TensorSpec(dtype, (ceil(s[0] / FP8_BLOCK), ceil(s[1] / FP8_BLOCK))),
    }


def _plain(dtype: str) -> Callable[[Shape], Parts]:
    return lambda s: {"": TensorSpec(dtype, s)}


# format of the recipe -> logical shape -> suffix -> stored tensor. A part named "" is the logical tensor itself, under
# its own name.
PARTS: dict[str, Callable[[Shape], Parts]] = {
    "fp4": lambda s: {
        "weight": TensorSpec("I8", (s[0], s[1] // 2)),
        "scale": TensorSpec("F8_E8M0", (s[0], s[1] // FP4_GROUP)),
    },
    "mxfp4": lambda s: {
        "weight_packed": TensorSpec("U8", (s[0], s[1] // 2)),
        "weight_scale": TensorSpec("U8", (s[0], s[1] // FP4_GROUP)),
    },
    "fp8": _fp8("scale", "F8_E8M0"),
    "fp8-ct": _fp8("weight_scale", "F32"),
    "int4": lambda s: {
        "weight_packed": TensorSpec("I32", (s[0], s[1] // 8)),
        "weight_scale": TensorSpec("BF16", (s[0], s[1] // INT4_GROUP)),
        "weight_shape": TensorSpec("I64", (2,)),
    },
    "bf16": _plain("BF16"),
    "f32": _plain("F32"),
    "int": _plain("I64"),
}
