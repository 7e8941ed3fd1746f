"""transformers: DeepSeek-V4's MTP block is dropped when a checkpoint is loaded, without a word, and so never saved.

python c2_transformers_mtp.py; needs torch and transformers, a few seconds on a CPU. Exit code 0 when the block is
lost, 1 when it is kept or named in a warning.
"""

import logging
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
    "num_nextn_predict_layers": 1,
}


class Heard(logging.Handler):
    """Keeps what transformers logs."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> int:
    print(f"transformers {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    heard = Heard()
    logging.getLogger("transformers").addHandler(heard)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file, saved = Path(folder, "model.safetensors"), Path(folder, "saved")
        DeepseekV4ForCausalLM(DeepseekV4Config(**SMALL)).save_pretrained(folder)
        tensors = load_file(file)
        # Tensors of the block as DeepSeek publishes them; which ones does not matter.
        tensors |= {f"mtp.0.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm", "norm")}
        tensors |= {f"mtp.0.{name}.weight": torch.eye(64) for name in ("e_proj", "h_proj")}
        save_file(tensors, file, {"format": "pt"})
        print("in the checkpoint:", sum(name.startswith("mtp.") for name in tensors), "tensors mtp.*")

        model, info = DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True)
        unexpected = [name for name in info["unexpected_keys"] if "mtp." in name]
        warned = [line for line in heard.lines if "mtp" in line]
        print("unexpected keys that from_pretrained reports:", len(unexpected))
        print("log lines that name them:", len(warned))
        model.save_pretrained(saved)
        kept = [name for name in load_file(saved / "model.safetensors") if "mtp." in name]
        print("after save_pretrained:", len(kept), "tensors mtp.*")
    return 1 if unexpected or warned or kept else 0


if __name__ == "__main__":
    sys.exit(main())
