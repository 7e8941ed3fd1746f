"""Tensors of every dtype that a checkpoint may hold, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from synthetic import Tensors

from v4forge.errors import UserError


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert caught.value.hint
    assert "\n" not in caught.value.fact + caught.value.hint
    return caught.value.fact


# One tensor of every dtype that a DeepSeek-V4 file holds, and shapes that are easy to get wrong.
def every_dtype() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    byte = torch.randint(3, 100, (5, 7), dtype=torch.uint8, generator=generator)
    return {
        "z.e8m0": byte.view(torch.float8_e8m0fnu),
        "a.e4m3": byte.view(torch.float8_e4m3fn),
        "i8": byte.view(torch.int8),
        "bf16": torch.randn(3, 5, generator=generator).bfloat16(),
        "transposed": torch.randn(3, 5, generator=generator).t(),
        "f32 scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "i32": torch.arange(3, dtype=torch.int32),
        "i64": torch.arange(3).view(1, 3),
    }


METADATA = {"fingerprint": "f", "a": "1", "layer": "3", "losses": "[1, 2]", "é": "ü"}
