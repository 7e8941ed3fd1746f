"""The config of DeepSeek-V4-Flash, as far as the layout reads it."""

from __future__ import annotations

from typing import Any

# DeepSeek-V4-Flash's sizes; the last of the 44 ratios is the MTP block's.
FLASH: dict[str, Any] = {
    "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
    "head_dim": 512,
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "vocab_size": 129280,
}
