"""THE table: which tensor of a DeepSeek-V4 checkpoint gets which precision, and why.

Calibrate, postprocess, verify and the model card read it; no other file repeats a tensor-name pattern. A name here is
*logical*: the weight, not how it is stored (`layers.3.attn.wq_a.weight`, whatever tensors hold it; see formats.PARTS).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from v4forge.checkpoint.formats import FP8_BLOCK, INT4_GROUP


@dataclass(frozen=True)
class Rule:
    """Logical names that match `pattern` are stored as `source` upstream and as `artifact` in ours."""

    kind: str
    pattern: str
    source: str
    artifact: str
    why: str


# The first rule that matches wins, so the MTP block and the exceptions come before what they are exceptions to.
RULES: tuple[Rule, ...] = (
    Rule(
        "routed experts",
        r"layers\.\d+\.ffn\.experts\.\d+\.w[123]\.weight",
        "fp4",
        "int4",
        "nine tenths of the bytes; GPTQ keeps what they compute",
    ),
    Rule(
        "attention projections",
        r"layers\.\d+\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.weight",
        "fp8",
        "fp8-ct",
        "already FP8 128x128 with power-of-two scales: the bytes pass through, nothing is rounded twice",
    ),
    Rule("MTP experts", r"mtp\.\d+\.ffn\.experts\.\d+\.w[123]\.weight", "fp4", "bf16", "drafts keep their acceptance"),
    Rule(
        "MTP projections",
        r"mtp\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|ffn\.shared_experts\.w[123]|e_proj|h_proj)\.weight",
        "fp8",
        "bf16",
        "drafts keep their acceptance",
    ),
    Rule(
        "indexer queries",
        r"layers\.\d+\.attn\.indexer\.wq_b\.weight",
        "fp8",
        "bf16",
        "as in the published files; vLLM takes either",
    ),
    Rule(
        "shared experts",
        r"layers\.\d+\.ffn\.shared_experts\.w[123]\.weight",
        "fp8",
        "bf16",
        "every token uses them and they are small",
    ),
    Rule("output head", r"head\.weight", "bf16", "f32", "logits are compared at full precision; BF16 to F32 is exact"),
    Rule(
        "F32 parameters",
        r".*\.(attn_sink|ape|hc_(attn|ffn)_(fn|base|scale)|hc_head_(fn|base|scale)|gate\.bias)|hc_head_(fn|base|scale)",
        "f32",
        "f32",
        "hyper-connections, sinks, position and router biases are sensitive: written as BF16 they lose bits (C13)",
    ),
    Rule(
        "hash routing tables",
        r"layers\.\d+\.ffn\.gate\.tid2eid",
        "int",
        "int",
        "token id to expert ids, data not weights",
    ),
    Rule(
        "everything else", r".*\.weight", "bf16", "bf16", "norms, router gates, compressors, indexer, embedding: small"
    ),
)

# Copies that loaders other than vLLM expect inside the MTP block: alias -> the logical tensor it repeats (C14).
ALIASES = {"mtp.0.head.weight": "head.weight", "mtp.0.emb.tok_emb.weight": "embed.weight"}


@lru_cache(maxsize=1 << 18)
def rule_for(name: str) -> Rule:
    """The rule of a logical tensor name; raises KeyError for a name that no rule knows."""
    for rule in RULES:
        if re.fullmatch(rule.pattern, name):
            return rule
    raise KeyError(name)


def _layer_pattern(num_layers: int) -> str:
    return "|".join(str(i) for i in range(num_layers))


def quantization_config(num_layers: int) -> dict:
    """The compressed-tensors `quantization_config` of the artifact, as vLLM resolves it on its own module names.

    Targets are anchored to layers 0..num_layers-1 and to both names under which vLLM probes a fused module. vLLM calls
    the MTP block `model.layers.<num_layers>`, where an ignore list of `mtp.*` would do nothing (C10, N4); the list is
    for loaders that keep the upstream name.
    """
    layers = _layer_pattern(num_layers)
    prefix = rf"re:^(?:model\.)?layers\.(?:{layers})\."
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "scale_fmt": "ue8m0",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {
            "attention": {
                "format": "float-quantized",
                "targets": [rf"{prefix}attn\.(wq_a|wkv|wq_b|wo_a|wo_b|fused_wqa_wkv)$"],
                "weights": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "block",
                    "block_structure": [FP8_BLOCK, FP8_BLOCK],
                    "symmetric": True,
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "strategy": "group",
                    "group_size": INT4_GROUP,
                    "symmetric": True,
                    "dynamic": True,
                },
                "output_activations": None,
            },
            "experts": {
                "format": "pack-quantized",
                "targets": [rf"{prefix}ffn\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": INT4_GROUP,
                    "symmetric": True,
                    "dynamic": False,
                    "actorder": "static",
                },
                "input_activations": None,
                "output_activations": None,
            },
        },
        "ignore": [
            "lm_head",
            "head",
            r"re:.*mtp\..*",
            r"re:.*compressor.*",
            r"re:.*indexer.*",
            r"re:.*shared_experts.*",
        ],
    }
