"""llm-compressor: load_quantizable_moe needs torchvision, which llm-compressor does not require, even for text models.

python llmcompressor_torchvision.py; needs llmcompressor and no torchvision, a few seconds on a CPU. Exit code 0 when
the load fails, 1 when it does not.
"""

import sys
import tempfile
from importlib.metadata import requires

import llmcompressor
import transformers
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from packaging.requirements import Requirement
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 64,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "compress_ratios": [0],
    "qk_rope_head_dim": 16,
}


def main() -> int:
    print(f"llmcompressor {llmcompressor.__version__}, transformers {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    stated = [Requirement(line) for line in requires("llmcompressor") or []]
    asked = [r for r in stated if r.name == "torchvision" and (r.marker is None or r.marker.evaluate({"extra": ""}))]
    print("llmcompressor requires torchvision:", bool(asked))
    with tempfile.TemporaryDirectory() as folder:
        DeepseekV4ForCausalLM(DeepseekV4Config(**SMALL)).save_pretrained(folder)
        try:
            with load_quantizable_moe(DeepseekV4ForCausalLM):
                DeepseekV4ForCausalLM.from_pretrained(folder)
        except ImportError as error:
            print(f"load_quantizable_moe: {type(error).__name__}: {error}")
            return 0
    print("load_quantizable_moe: loads")
    return 1


if __name__ == "__main__":
    sys.exit(main())
