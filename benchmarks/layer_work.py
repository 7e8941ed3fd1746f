"""What a full-size layer must compute and move at least, stage by stage, and what its time makes of all 43 layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4forge.checkpoint import layout
from v4forge.model import deepseek_v4
from v4forge.pipeline import requirements
from v4forge.quantization.experts import ERROR_ROWS
from v4forge.units import GB

ENERGIES = 4  # of the outputs and of what each of layer_files.LOST loses of them
LINK_GBPS = 200.0  # between GPUs, for the projection: less than half of NVLink's 450 in one direction


@dataclass(frozen=True)
class Work:
    """What a stage of one layer has to do, and by which ceiling it is judged."""

    amount: float  # floating-point operations, or bytes
    ceiling: str


def work_of(config: layout.Config, layer: int, tokens: int, seq_len: int) -> dict[str, Work]:
    """The least that each stage must compute or move for one layer. Matrix products count 2 operations a term."""
    c, e = config, config.n_routed_experts
    hidden, inner = c.hidden_size, c.moe_intermediate_size
    rows = tokens * c.num_experts_per_tok
    frame = sum(
        math.prod(shape)
        for name, shape in layout.layer_parameters(c, layer)
        if len(shape) == 2 and not deepseek_v4.EXPERT.search(name) and not name.endswith(("tid2eid", "ape"))
    )
    ratio = c.compress_ratios[layer]
    keys = seq_len + (seq_len // ratio if ratio else 0)
    attention = 2 * 2 * c.num_attention_heads * c.head_dim * keys
    weights = e * 3 * hidden * inner
    sizes = requirements.sizes_of(c)
    return {
        "read": Work(sizes.upstream[f"layers.{layer}"], "disk read GB/s"),
        "decode": Work(weights * (0.5 + 1 / 32 + 2), "copy GB/s"),
        "forward 1": Work(tokens * (2 * frame + attention), "bf16 TFLOP/s"),
        "Hessian": Work(2 * rows * (hidden**2 + inner**2 + hidden * 2 * inner), "bf16 TFLOP/s"),
        "scales": Work(weights * 2, "copy GB/s"),
        "factorize": Work(e * (hidden**3 + inner**3) / 3, "f32 TFLOP/s"),
        "sweep": Work(e * (2 * inner * hidden**2 + hidden * inner**2), "tf32 TFLOP/s"),
        "refit": Work(2 * 2 * e * (2 * inner * hidden**2 + hidden * inner**2), "tf32 TFLOP/s"),
        "errors": Work(ENERGIES / ERROR_ROWS * 2 * e * (2 * inner * hidden**2 + hidden * inner**2), "tf32 TFLOP/s"),
        "pack": Work(weights * (1 + 0.5 + 2), "copy GB/s"),
        "forward 2": Work(2 * rows * 3 * hidden * inner, "bf16 TFLOP/s"),
        "write": Work(sizes.artifact[f"layers.{layer}"], "disk write GB/s"),
    }


def projection(
    config: layout.Config,
    by_kind: Mapping[int, float],
    samples: int,
    seq_len: int,
    gpus: int,
    read: float,
    write: float,
) -> dict[str, Any]:
    """Wall time of the 43 layers: the larger of computing and of the disk. by_kind: compress ratio -> compute seconds.

    Computing is divided by the GPUs, because samples and experts are; the exchange of tokens between them is added.
    """
    sizes = requirements.sizes_of(config)
    ratios = config.compress_ratios[: config.num_hidden_layers]
    compute = sum(by_kind[ratio] for ratio in ratios) / gpus
    rows = samples * seq_len * config.num_experts_per_tok * config.hidden_size * 2
    exchanged = 2 * rows * (gpus - 1) / gpus / gpus * len(ratios)
    exchange = exchanged / LINK_GBPS / GB
    read_s = requirements.layer_bytes(sizes.upstream) / read / GB
    write_s = requirements.layer_bytes(sizes.artifact) / write / GB
    total = max(compute + exchange, read_s + write_s)
    counts = " + ".join(f"{ratios.count(ratio)} x {by_kind[ratio]:.2f}" for ratio in sorted(by_kind))
    return {
        "gpus": gpus,
        "read GB/s": read,
        "write GB/s": write,
        "compute_s": compute,
        "exchange_s": exchange,
        "read_s": read_s,
        "write_s": write_s,
        "total_s": total,
        "arithmetic": f"max(({counts}) s / {gpus} + {exchange:.1f} s, {read_s:.0f} s read + {write_s:.0f} s write)",
    }
