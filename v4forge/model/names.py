"""What upstream's files call a tensor of a block, and what transformers calls it."""

from __future__ import annotations

import re

# Upstream names inside a block -> names in transformers' DeepseekV4DecoderLayer, first match wins.
RENAMES = (
    (r"^attn\.indexer\.compressor\.norm\.", "self_attn.compressor.indexer.kv_norm."),
    (r"^attn\.indexer\.compressor\.wkv\.", "self_attn.compressor.indexer.kv_proj."),
    (r"^attn\.indexer\.compressor\.wgate\.", "self_attn.compressor.indexer.gate_proj."),
    (r"^attn\.indexer\.compressor\.ape$", "self_attn.compressor.indexer.position_bias"),
    (r"^attn\.indexer\.wq_b\.", "self_attn.compressor.indexer.q_b_proj."),
    (r"^attn\.indexer\.weights_proj\.", "self_attn.compressor.indexer.scorer.weights_proj."),
    (r"^attn\.compressor\.norm\.", "self_attn.compressor.kv_norm."),
    (r"^attn\.compressor\.wkv\.", "self_attn.compressor.kv_proj."),
    (r"^attn\.compressor\.wgate\.", "self_attn.compressor.gate_proj."),
    (r"^attn\.compressor\.ape$", "self_attn.compressor.position_bias"),
    (r"^attn\.attn_sink$", "self_attn.sinks"),
    (r"^attn\.q_norm\.", "self_attn.q_a_norm."),
    (r"^attn\.kv_norm\.", "self_attn.kv_norm."),
    (r"^attn\.wq_a\.", "self_attn.q_a_proj."),
    (r"^attn\.wq_b\.", "self_attn.q_b_proj."),
    (r"^attn\.wkv\.", "self_attn.kv_proj."),
    (r"^attn\.wo_a\.", "self_attn.o_a_proj."),
    (r"^attn\.wo_b\.", "self_attn.o_b_proj."),
    (r"^attn_norm\.", "input_layernorm."),
    (r"^ffn_norm\.", "post_attention_layernorm."),
    (r"^hc_(attn|ffn)_(fn|base|scale)$", r"\1_hc.\2"),
    (r"^ffn\.gate\.bias$", "mlp.gate.e_score_correction_bias"),
    (r"^ffn\.gate\.", "mlp.gate."),
    (r"^ffn\.shared_experts\.w1\.", "mlp.shared_experts.gate_proj."),
    (r"^ffn\.shared_experts\.w2\.", "mlp.shared_experts.down_proj."),
    (r"^ffn\.shared_experts\.w3\.", "mlp.shared_experts.up_proj."),
)


def renamed(name: str) -> str:
    """A block's upstream name (without `layers.N.`) under transformers' name."""
    for pattern, replacement in RENAMES:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    raise KeyError(name)
