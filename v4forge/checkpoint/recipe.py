"""THE table: which tensor of a DeepSeek-V4 checkpoint gets which precision, and why; and the recipes that vary it.

Calibrate, postprocess, verify and the model card read it; no other file repeats a tensor-name pattern. A name here is
*logical*: the weight, not how it is stored (`layers.3.attn.wq_a.weight`, whatever tensors hold it; see formats.PARTS).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from v4forge.checkpoint.formats import FP4_GROUP, FP8_BLOCK, INT4_GROUP


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

INT4, MIXED = "int4", "mixed"
RECIPES = {
    INT4: "routed experts INT4 in every layer",
    MIXED: "routed experts INT4, those of hash-routed layers upstream's own FP4",
}

# What the groups of the routed experts are called in quantization_config.
EXPERTS, FP4_EXPERTS = "experts", "fp4_experts"

# Copies that loaders other than vLLM expect inside the MTP block: alias -> the logical tensor it repeats (C14).
ALIASES = {"mtp.0.head.weight": "head.weight", "mtp.0.emb.tok_emb.weight": "embed.weight"}


@lru_cache
def rules(fp4_layers: int = 0) -> tuple[Rule, ...]:
    """The table of a recipe under which the first `fp4_layers` layers' routed experts keep upstream's FP4."""
    if not fp4_layers:
        return RULES
    kept = Rule(
        "hash-routed experts",
        rf"layers\.({_layer_pattern(range(fp4_layers))})\.ffn\.experts\.\d+\.w[123]\.weight",
        "fp4",
        "mxfp4",
        f"{named_layers(fp4_layers)}: INT4 costs more here than elsewhere, so upstream's own bytes stay",
    )
    return (kept, *RULES)


@lru_cache(maxsize=1 << 18)
def rule_for(name: str, fp4_layers: int = 0) -> Rule:
    """The rule of a logical tensor name; its `source` is that of every recipe. Raises KeyError for a name that no rule
    knows. Config.rule_for knows the recipe."""
    for rule in rules(fp4_layers):
        if re.fullmatch(rule.pattern, name):
            return rule
    raise KeyError(name)


def named_layers(count: int) -> str:
    """The first `count` layers, in words."""
    return "layer 0" if count == 1 else f"layers 0 to {count - 1}"


def stated(quantization: object) -> str:
    """The recipe that a quantization_config is of, by its groups; whether it is exactly that one's is not looked at."""
    groups = quantization.get("config_groups") if isinstance(quantization, dict) else None
    return MIXED if isinstance(groups, dict) and FP4_EXPERTS in groups else INT4


def _layer_pattern(layers: range) -> str:
    return "|".join(map(str, layers))


def quantization_config(num_layers: int, fp4_layers: int = 0) -> dict:
    """The compressed-tensors `quantization_config` of the artifact, as vLLM resolves it on its own module names.

    Under `fp4_layers` the first so many layers have a group of their own: vLLM takes one scheme for all of a layer's
    experts, that of expert 0.

    Targets are anchored to layers 0..num_layers-1 and to both names under which vLLM probes a fused module. vLLM calls
    the MTP block `model.layers.<num_layers>`, where an ignore list of `mtp.*` would do nothing (C10, N4); the list is
    for loaders that keep the upstream name.
    """
    prefix = _module_prefix(range(num_layers))
    groups = {EXPERTS: _int4_experts(range(fp4_layers, num_layers))} if fp4_layers < num_layers else {}
    if fp4_layers:
        groups[FP4_EXPERTS] = _fp4_experts(range(fp4_layers))
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
            **groups,
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


def _module_prefix(layers: range) -> str:
    return rf"re:^(?:model\.)?layers\.(?:{_layer_pattern(layers)})\."


def _expert_targets(layers: range) -> list[str]:
    return [rf"{_module_prefix(layers)}ffn\.experts\.\d+\.(w1|w2|w3|gate_proj|up_proj|down_proj)$"]


def _int4_experts(layers: range) -> dict:
    return {
        "format": "pack-quantized",
        "targets": _expert_targets(layers),
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
    }


def _fp4_experts(layers: range) -> dict:
    """compressed-tensors' preset MXFP4A16."""
    return {
        "format": "mxfp4-pack-quantized",
        "targets": _expert_targets(layers),
        "weights": {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": FP4_GROUP,
            "symmetric": True,
            "dynamic": False,
            "scale_dtype": "torch.uint8",
        },
        "input_activations": None,
        "output_activations": None,
    }
