"""Routed experts in torch, in BF16: DeepSeek-V4's routing and clamped SwiGLU are what vLLM's CPU kernels refuse.

INT4 and MXFP4 weights become BF16 once, when they have been loaded. vLLM's own CPU kernel for INT4 would make
activations INT8, and for MXFP4 there is none.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes by a code's low three bits; bit 3 is the sign
NIBBLES = 8  # INT4 codes in an INT32 word, the lowest first; a code is its value plus 8


class TorchExperts(mk.FusedMoEExpertsModular):
    """Experts as vLLM's modular kernels expect them: w1 [E, 2 * intermediate, hidden] gate then up, w2 [E, hidden,
    intermediate], both BF16."""

    expects_unquantized_inputs = True
    _supports_current_device = staticmethod(lambda: True)
    _supports_no_act_and_mul = staticmethod(lambda: False)
    _supports_activation = staticmethod(lambda activation: activation == MoEActivation.SILU)
    _supports_parallel_config = staticmethod(lambda parallel_config: not parallel_config.use_ep)
    _supports_quant_scheme = staticmethod(lambda weight_key, activation_key: activation_key is None)
    _supports_routing_method = staticmethod(lambda routing_method, weight_key, activation_key: True)
    _supports_router_logits_dtype = staticmethod(lambda router_logits_dtype, routing_method: True)

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    def supports_expert_map(self) -> bool:
        return False

    def workspace_shapes(self, M: int, N: int, K: int, *_: Any, **__: Any) -> tuple[tuple[int, ...], ...]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        """output [tokens, hidden] = sum of the chosen experts' outputs, weighted."""
        total = torch.zeros(hidden_states.shape, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            tokens, place = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = nn.functional.linear(hidden_states[tokens], w1[expert]).chunk(2, dim=-1)
            if limit := self.moe_config.swiglu_limit:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            part = nn.functional.linear(nn.functional.silu(gate) * up, w2[expert])
            total.index_add_(0, tokens, part.float() * topk_weights[tokens, place, None].float())
        output.copy_(total)


def decoded(packed: Tensor, scales: Tensor) -> Tensor:
    """BF16 [E, out, in] of INT4 codes `packed` i32 [E, in / 8, out] and their `scales` [E, in / group, out]."""
    shifts = 4 * torch.arange(NIBBLES, dtype=torch.int32)
    codes = (packed.unsqueeze(2) >> shifts[:, None]) & 15  # [E, in / 8, 8, out]
    codes = codes.flatten(1, 2) - 8
    group = codes.shape[1] // scales.shape[1]
    weights = codes.to(torch.float32) * scales.float().repeat_interleave(group, dim=1)
    return weights.to(torch.bfloat16).transpose(1, 2).contiguous()


def prepare(
    w13_packed: Tensor, w2_packed: Tensor, w13_scale: Tensor, w2_scale: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    """In place of the packing for vLLM's INT4 kernel: weights in BF16; scales and zero points are used no more."""
    empty = torch.empty(0)
    return decoded(w13_packed, w13_scale), decoded(w2_packed, w2_scale), empty, empty, empty, empty


def decoded_mxfp4(packed: Tensor, scales: Tensor) -> Tensor:
    """BF16 [E, out, in] of E2M1 codes `packed` u8 [E, out, in / 2], the low nibble first, and their `scales`, bytes of
    E8M0 [E, out, in / 32]."""
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.bfloat16)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(2)
    powers = scales.view(torch.float8_e8m0fnu).to(torch.bfloat16)
    weights = values[codes.int()].unflatten(-1, (scales.shape[-1], -1)) * powers.unsqueeze(-1)
    return weights.flatten(2)


def prepare_mxfp4(self: Any, layer: nn.Module) -> None:
    """In place of the packing for Marlin: weights in BF16, and the experts above for them."""
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import make_mxfp4_moe_kernel

    for name in ("w13", "w2"):
        packed = getattr(layer, f"{name}_weight_packed").data
        weights = decoded_mxfp4(packed, getattr(layer, f"{name}_weight_scale").data)
        delattr(layer, f"{name}_weight_packed")
        layer.register_parameter(f"{name}_weight", nn.Parameter(weights, requires_grad=False))
    self.experts_cls, self.moe_quant_config = TorchExperts, FUSED_MOE_UNQUANTIZED_CONFIG
    self.moe_kernel = make_mxfp4_moe_kernel(
        moe_quant_config=self.moe_quant_config,
        moe_config=self.moe,
        experts_cls=TorchExperts,
        mxfp4_backend=self.mxfp4_backend,
        routing_tables=layer._expert_routing_tables(),
    )


def replace() -> None:
    cpu_moe.CPUExpertsInt4 = TorchExperts
    cpu_moe.prepare_int4_moe_layer_for_cpu = prepare
    cpu_moe.CPUUnquantizedExperts = cpu_moe.X86CPUUnquantizedExperts = TorchExperts
