"""A small dense model with random weights, for a vLLM as it is: Qwen3 with the tokenizer of models/tiny."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
# What it is served with, in place of what DeepSeek-V4 needs.
SETTINGS = {
    "tokenizer-mode": "auto",
    "kv-cache-dtype": "auto",
    "block-size": "128",
    "tool-call-parser": "hermes",
    "reasoning-parser": "",
}


def write(folder: Path) -> Path:
    """Writes the model into a new folder, as transformers does."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"architectures": ["Qwen3ForCausalLM"]}))
    for path in (folder, *folder.iterdir()):  # in a container, another user serves it
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


# What the probe finds of it: it has no thoughts, its calls no arguments, and the guard over weights is DeepSeek-V4's.
CANNOT = ("tool-call", "reasoning", "weights")
