"""transformers: a DeepSeek-V4 that is loaded and saved has tensor names that are neither upstream's nor its own.

python transformers_names.py; needs torch and transformers, a few seconds on a CPU. Exit code 0 when names differ, 1
when they are upstream's again.
"""

import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 64,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128],
    "qk_rope_head_dim": 16,
}
# From what save_pretrained writes to what DeepSeek publishes.
UPSTREAM = (
    (r"^model\.", ""),
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
)


def upstream(name: str) -> str:
    for pattern, replacement in UPSTREAM:
        name = re.sub(pattern, replacement, name)
    return name


def main() -> int:
    print(f"transformers {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "model.safetensors"
        DeepseekV4ForCausalLM(DeepseekV4Config(**SMALL)).save_pretrained(folder)
        before = {upstream(name): tensor for name, tensor in load_file(file).items()}
        save_file(before, file, {"format": "pt"})
        model, info = DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True)
        print("loaded from upstream's names; missing:", len(info["missing_keys"]))
        model.save_pretrained(folder / "saved")
        after = load_file(folder / "saved" / "model.safetensors")
    changed = sorted(before.keys() - after.keys())
    print(f"{len(changed)} of {len(before)} names changed by loading and saving, such as")
    for name in ("embed.weight", "hc_head_fn", "layers.1.attn.kv_norm.weight", "layers.1.attn.wq_a.weight"):
        found = next((other for other in after if upstream(other) == name), "nothing")
        print(f"  {name} -> {found}")
    return 0 if changed else 1


if __name__ == "__main__":
    sys.exit(main())
