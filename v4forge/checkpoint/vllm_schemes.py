"""Which scheme vLLM's modules get from a quantization_config, worked out by compressed-tensors' own classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from v4forge.checkpoint.formats import FP4_GROUP, INT4_GROUP
from v4forge.checkpoint.layout import Config
from v4forge.checkpoint.recipe import EXPERTS, FP4_EXPERTS
from v4forge.lean_imports import lean

with lean("compressed_tensors.quantization"):  # which imports transformers
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

# type, bits, strategy and group size of the weights
KINDS = {
    "attention": ("float", 8, "block", None),
    EXPERTS: ("int", 4, "group", INT4_GROUP),
    FP4_EXPERTS: ("float", 4, "group", FP4_GROUP),
}


def served_modules(config: Config) -> dict[str, str | None]:
    """vLLM's module names -> the quantization they must resolve to: a key of KINDS, or None for none.

    Names of vLLM 0.26 to 0.33: one layer of each attention kind, the first and last expert, and the MTP block as layer
    `num_hidden_layers` and under its upstream name.
    """
    names: dict[str, str | None] = {"lm_head": None, "model.embed_tokens": None}
    last = config.n_routed_experts - 1
    for layer in (*config.layers, config.num_hidden_layers):
        mtp = layer == config.num_hidden_layers
        routed = FP4_EXPERTS if layer < config.fp4_layers else EXPERTS
        for prefix in [f"model.layers.{layer}"] + ([f"model.layers.{layer}.mtp_block", "mtp.0"] if mtp else []):
            for projection in ("wq_a", "wkv", "fused_wqa_wkv", "wq_b", "wo_a", "wo_b"):
                names[f"{prefix}.attn.{projection}"] = None if mtp else "attention"
            for expert in (0, last):
                for matrix in ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"):
                    names[f"{prefix}.ffn.experts.{expert}.{matrix}"] = None if mtp else routed
            for plain in (
                *(f"attn.compressor.{m}" for m in ("wkv", "wgate", "fused_wkv_wgate")),
                *(f"attn.indexer.{m}" for m in ("wq_b", "weights_proj")),
                *(f"attn.indexer.compressor.{m}" for m in ("wkv", "fused_wkv_wgate")),
                *(f"ffn.shared_experts.{m}" for m in ("w1", "w2", "w3", "gate_up_proj", "down_proj")),
                *("ffn.gate", "e_proj", "h_proj", "shared_head.head"),
            ):
                names[f"{prefix}.{plain}"] = None
    return names


def _schemes(parsed: QuantizationConfig, module: str) -> tuple[bool, list[tuple[Any, ...] | None]]:
    """Whether the module is ignored, and a value of KINDS for the weights in each group that it matches."""
    ignored = any(match_name(module, pattern) for pattern in parsed.ignore or [])
    weights = [g.weights for g in parsed.config_groups.values() if any(match_name(module, t) for t in g.targets)]
    return ignored, [
        tuple(getattr(v, "value", v) for v in (w.type, w.num_bits, w.strategy, w.group_size)) if w else None
        for w in weights
    ]


def unresolved(config: Config) -> Iterator[str]:
    """The vLLM modules that config.json's quantization_config does not give what it should, a line each."""
    stated = config.raw.get("quantization_config") or {}
    try:
        parsed = QuantizationConfig.model_validate(stated)
        resolved = {module: _schemes(parsed, module) for module in served_modules(config)}
    except Exception as error:  # pydantic's, or re's for a target that is no regular expression
        yield f"config.json: quantization_config is not compressed-tensors': {str(error).splitlines()[0]}"
        return
    mtp = ("mtp.0.", f"model.layers.{config.num_hidden_layers}.")
    for module, wanted in served_modules(config).items():
        ignored, schemes = resolved[module]
        found = None if ignored or not schemes else schemes[0]
        if len(schemes) > 1:
            yield f"config.json: {module} matches {len(schemes)} groups"
        elif found != (KINDS[wanted] if wanted else None):
            cause = "C10: targets reach into the MTP block" if module.startswith(mtp) else "N4: targets are other names"
            yield f"config.json: {module} resolves to {found}, expected {KINDS.get(wanted or '')} ({cause})"
