"""Our GPTQ beside llm-compressor's batched kernel, on the same weights, Hessians and scales."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import clocked
from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import deepseek_v4, expert_dispatch
from v4forge.model.distributed import Ranks
from v4forge.quantization import experts, gptq, layer, layer_files, peer_gptq

PEER_BATCH = 32  # experts llm-compressor quantizes at a time
CHECKED = 4  # experts of a batch whose loss is computed in float64


def against_peer(source: Checkpoint, tokens: Tensor, device: torch.device, peer: bool) -> dict[str, Any]:
    """Our GPTQ and llm-compressor's batched one on the weights and Hessians of layer 0, with the same scales.

    Theirs a module at a time, in batches of 32 experts; w1 and w3 are modules of their own there. Neither scales nor
    copies that their kernel may overwrite are in the times.
    """
    config, hf_config = source.config, deepseek_v4.hf_config(source.config)
    weights = deepseek_v4.Weights(source, device)
    root = deepseek_v4.load_root(weights, hf_config)
    frame = deepseek_v4.load_layer(weights, hf_config, 0, experts=False)
    rotary = deepseek_v4.Rotary(hf_config, device, weights.dtype)
    attended = [
        deepseek_v4.attend(frame, deepseek_v4.embed(root, hf_config, batch), rotary.context(batch))
        for batch in tokens.to(device).split(layer_files.Settings().micro_batch(tokens.shape[1]))
    ]
    x, indices = torch.cat([a.x for a in attended]), torch.cat([a.indices for a in attended])
    del attended, root, frame
    routed = expert_dispatch.Dispatch(Ranks(), x, indices, config.n_routed_experts)
    sample = routed.sample(experts.SAMPLE_FACTOR * config.moe_intermediate_size)
    common = experts.Common(gptq.gram(x) / len(x), sample)
    inner, damp = config.moe_intermediate_size, layer_files.Settings().dampening
    ours_s, theirs_s, equal, codes = [], [], 0, 0
    losses = {"ours": 0.0, "theirs": 0.0}
    at_once = layer.EXPERT_BATCH[device.type]
    for first in range(0, config.n_routed_experts, PEER_BATCH):
        some = range(first, min(first + PEER_BATCH, config.n_routed_experts))
        matrices = {
            which: torch.stack([weights(f"layers.0.ffn.experts.{e}.{which}.weight", shape) for e in some])
            for which, shape in (("w1", (inner, x.shape[1])), ("w3", (inner, x.shape[1])), ("w2", (x.shape[1], inner)))
        }
        gate_up, down = torch.cat((matrices["w1"], matrices["w3"]), 1), matrices["w2"]
        h = experts.hessians(routed.rows([some]), gate_up, float(hf_config.swiglu_limit), common, some)
        problems = [(gate_up, h.hidden), (down, h.inner)]
        scales = [gptq.searched_scales(w, of.diagonal(dim1=-2, dim2=-1)) for w, of in problems]

        def ours(problems: Any = problems, scales: Any = scales) -> list[Tensor]:
            found = []
            for (w, of), scale in zip(problems, scales, strict=True):
                parts = zip(w.split(at_once), of.split(at_once), scale.split(at_once), strict=True)
                found.append(torch.cat([gptq.gptq(a, b, c, damp).codes for a, b, c in parts]))
            return [found[0][:, :inner], found[0][:, inner:], found[1]]

        if first == 0:
            ours()
        seconds_taken, ours_codes = clocked(ours, device)
        ours_s.append(seconds_taken)
        if not peer:
            continue
        cases = [
            (matrices["w1"], h.hidden, scales[0][:, :inner]),
            (matrices["w3"], h.hidden, scales[0][:, inner:]),
            (matrices["w2"], h.inner, scales[1]),
        ]
        taken = 0.0
        for (w, of, scale), mine in zip(cases, ours_codes, strict=True):
            if first == 0:
                peer_codes(w[:2], of[:2].clone(), scale[:2], damp, device)
            spent, found = peer_codes(w, of.clone(), scale, damp, device)
            taken += spent
            equal += int((found == mine).sum())
            codes += mine.numel()
            for e in range(0, len(some), max(1, len(some) // CHECKED)):
                for name, each in (("ours", mine), ("theirs", found)):
                    losses[name] += weighted_loss(w[e], each[e], scale[e], of[e])
        theirs_s.append(taken)
    result: dict[str, Any] = {"ours_s": ours_s, "ours_total_s": sum(ours_s), "matrices": 3 * config.n_routed_experts}
    if peer:
        result |= {
            "llmcompressor": version("llmcompressor"),
            "theirs_s": theirs_s,
            "theirs_total_s": sum(theirs_s),
            "time_ratio": sum(ours_s) / sum(theirs_s),
            "loss_ratio": losses["ours"] / losses["theirs"],
            "equal_codes": equal / codes,
        }
    return result


def peer_codes(
    weights: Tensor, hessians: Tensor, scale: Tensor, dampening: float, device: torch.device
) -> tuple[float, Tensor]:
    """llm-compressor's GPTQ: seconds and codes."""
    spent, (found, _) = clocked(lambda: peer_gptq.quantized(weights, hessians, scale, dampening), device)
    return spent, found.codes


def weighted_loss(weights: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    values = codes.double() * scale.double().repeat_interleave(128, -1)
    off = weights.double() - values
    return float(((off @ hessian.double()) * off).sum())
