"""GPTQ by llm-compressor: its own batched implementation in the place of our factorization and sweep, at our scales.

A second opinion on gptq.py that anybody can run: `python -m scripts.calibrate --engine llmcompressor`. Everything
around it, Hessians, scales, refit, layer files, is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4forge.checkpoint.formats import INT4_GROUP
from v4forge.quantization import gptq

BLOCK = 128  # columns, its own default


def quantized(weights: Tensor, hessians: Tensor, scale: Tensor, dampening: float) -> tuple[gptq.Quantized, Tensor]:
    """weights: [E, out, in]; hessians: [E, in, in] f32, or one for all, left as they are; scale: [E, out, in/128] bf16
    -> Quantized, and [E] whether it gave up and rounded to nearest."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # takes seconds, and only this needs it

    own = hessians.expand(len(weights), -1, -1).clone()  # which it overwrites
    wide = scale.float().contiguous()
    values, _, fallback = quantize_weight(
        weights.float().contiguous(), own, wide, torch.zeros_like(wide), None, gptq.QUANT_ARGS, BLOCK, dampening
    )
    codes = (values.unflatten(-1, (-1, INT4_GROUP)) / wide.unsqueeze(-1)).round().to(torch.int8).flatten(-2)
    return gptq.Quantized(codes, scale), fallback
