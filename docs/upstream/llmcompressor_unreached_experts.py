"""llm-compressor: GPTQ saves the matrices of an expert that no calibration token has reached as zeros, without a word.

python llmcompressor_unreached_experts.py; needs llmcompressor, half a minute on a CPU. Exit code 0 when the expert is
zero, 1 when it is not or when a warning names it.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["LLM_COMPRESSOR_LOG_DISABLED"] = "false"  # its warnings are what is looked for

import llmcompressor
import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

SMALL = {
    "vocab_size": 64,
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 64,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 0,
    "compress_ratios": [0],
    "qk_rope_head_dim": 16,
}
UNREACHED = 3
EXPERTS = {
    "targets": [r"re:.*mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
}


def main() -> int:
    print(f"llmcompressor {llmcompressor.__version__}, transformers {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    warnings: list[str] = []
    logger.remove()
    logger.add(lambda message: warnings.append(str(message)), level="WARNING")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:  # oneshot reads config.json where the model came from
        return reproduce(Path(folder), warnings)


def reproduce(folder: Path, warnings: list[str]) -> int:
    DeepseekV4ForCausalLM(DeepseekV4Config(**SMALL)).save_pretrained(folder)
    model = DeepseekV4ForCausalLM.from_pretrained(folder)
    # As for an expert that the calibration text has no use for: the router never chooses it.
    model.model.layers[0].mlp.gate.e_score_correction_bias.data[UNREACHED] = -1e4
    linearize_moe(model)
    samples = Dataset.from_list(
        [{"input_ids": torch.randint(0, 64, (32,)).tolist(), "attention_mask": [1] * 32} for _ in range(4)]
    )
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))),
        dataset=samples,
        recipe=GPTQModifier(config_groups={"experts": EXPERTS}, ignore=["lm_head"]),
        max_seq_length=32,
        num_calibration_samples=len(samples),
        moe_calibrate_all_experts=False,
        pipeline="sequential",
        sequential_targets=["DeepseekV4DecoderLayer"],
    )
    model.save_pretrained(folder / "saved")
    tensors = load_file(folder / "saved" / "model.safetensors")
    zero = 0
    for expert in range(SMALL["n_routed_experts"]):
        packed = [t for name, t in tensors.items() if f".experts.{expert}." in name and name.endswith("weight_packed")]
        words = sorted({f"{word & 0xFFFFFFFF:#010x}" for tensor in packed for word in tensor.flatten().tolist()})
        print(f"expert {expert}: {len(packed)} matrices, {len(words)} different words of 8 codes, such as {words[0]}")
        zero += expert == UNREACHED and words == ["0x88888888"]
    about = [line for line in warnings if f"experts.{UNREACHED}." in line or "statistics" in line]
    print(f"warnings about expert {UNREACHED}: {len(about)}")
    return 0 if zero and not about else 1


if __name__ == "__main__":
    sys.exit(main())
