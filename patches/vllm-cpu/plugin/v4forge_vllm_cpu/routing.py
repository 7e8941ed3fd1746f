"""DeepSeek-V4's routing in torch: vLLM's CPU kernels for it take 64, 128, 256 or 384 experts, and 6 or 8 of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def route(
    router_logits: Tensor,
    top_k: int,
    renormalize: bool,
    e_score_correction_bias: Tensor | None,
    routed_scaling_factor: float,
    input_ids: Tensor | None,
    hash_indices_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Weights [tokens, top_k] f32 and experts [tokens, top_k] i32 for `router_logits` [tokens, experts].

    Scores are sqrt(softplus(logits)). A layer with `hash_indices_table` [vocabulary, top_k] looks its experts up,
    others take those with the best score plus bias. The weights are the scores, divided by their sum, times the factor.
    """
    scores = nn.functional.softplus(router_logits.float()).sqrt()
    if hash_indices_table is not None:
        chosen = hash_indices_table[input_ids].long()
    else:
        chosen = (scores if e_score_correction_bias is None else scores + e_score_correction_bias).topk(top_k).indices
    weights = scores.gather(1, chosen)
    if renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights * routed_scaling_factor).contiguous(), chosen.to(torch.int32).contiguous()


def replace() -> None:
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    cpu_router._sqrtsoftplus_bias_topk = route
