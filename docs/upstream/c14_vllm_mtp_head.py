"""vLLM: its loader of DeepSeek-V4's MTP block skips the model's head and embedding, which the block drafts with.

python c14_vllm_mtp_head.py; needs vLLM, no GPU and no model. Exit code 0 when they are skipped, 1 when not.
"""

import os
import sys
from importlib.metadata import version
from types import SimpleNamespace

os.environ.update(VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

from vllm.models.deepseek_v4.nvidia import mtp

CONFIG = SimpleNamespace(num_hidden_layers=43, num_nextn_predict_layers=1)
# The head and embedding of DeepSeek's checkpoint, what else names them for the MTP block, and a tensor of the block.
NAMES = ("embed.weight", "head.weight", "mtp.0.emb.tok_emb.weight", "mtp.0.head.weight", "mtp.0.attn.wq_a.weight")


def main() -> int:
    print(f"vllm {version('vllm')}")
    skipped = []
    for name in NAMES:
        inside = name.replace("mtp.0.", f"model.layers.{CONFIG.num_hidden_layers}.")  # what load_weights does first
        layer = mtp.get_spec_layer_idx_from_weight_name(CONFIG, inside)  # None: load_weights goes on to the next tensor
        if layer is None:
            skipped.append(name)
        print(f"{name}: {'skipped' if layer is None else f'goes into layer {layer}'}")
    return 0 if {"embed.weight", "head.weight"} <= set(skipped) else 1


if __name__ == "__main__":
    sys.exit(main())
