"""transformers' DeepSeek-V4: its layer classes and config, without what only its whole models need.

Its layers find our attention by the name that their config has, `ATTENTION`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from v4forge.lean_imports import lean
from v4forge.model.attention import attention

with lean("transformers.models.deepseek_v4.modeling_deepseek_v4"):
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

__all__ = ["ATTENTION", "DeepseekV4Config", "hf", "unfilled"]

ATTENTION = "v4forge"
hf.ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


class _RealRanges(TorchFunctionMode):
    """torch.arange on the CPU, whatever the default device is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        here = {"device": "cpu"} if func is torch.arange else {}
        return func(*args, **{**here, **(kwargs or {})})


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules made within have their parameters on the meta device, where they take no memory.

    Rope tables begin with a range, which on that device is written in Python and imports torch._dynamo: it is real.
    """
    with torch.device("meta"), _RealRanges():
        yield
