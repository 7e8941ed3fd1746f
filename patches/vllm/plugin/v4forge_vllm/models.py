"""vLLM's DeepSeek-V4 classes, guarded. Imported by vLLM when it loads such a model, not before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.models import deepseek_v4

from v4forge_vllm import guard

Weights = Iterable[tuple[str, torch.Tensor]]


class DeepseekV4ForCausalLM(deepseek_v4.DeepseekV4ForCausalLM):
    """The target model. Its first load has to fill every parameter."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.weight_guard = guard.Guard.of(vllm_config, "the model", "layers.")

    def load_weights(self, weights: Weights) -> set[str]:
        return self.weight_guard.load(self, super().load_weights, weights)


class DeepSeekV4MTP(deepseek_v4.DeepSeekV4MTP):
    """The draft model. Its first load has to fill every parameter, but for the two that vLLM may share.

    Head and embedding may stay empty if vLLM replaces them with the target's before the draft model runs: its first
    forward pass, which vLLM makes while it starts, looks whether it has.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.weight_guard = guard.Guard.of(
            vllm_config, "the MTP block", "mtp.", shared=("embed_tokens", "shared_head.head")
        )

    def load_weights(self, weights: Weights) -> set[str]:
        return self.weight_guard.load(self, super().load_weights, weights)
