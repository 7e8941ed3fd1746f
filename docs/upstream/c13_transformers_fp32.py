"""transformers: DeepSeek-V4 loaded in BF16 cannot run, and what people do about it rounds its F32 parameters to BF16.

python c13_transformers_fp32.py; needs torch and transformers, a few seconds on a CPU. Exit code 0 when the forward pass
fails, 1 when it runs.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4

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
# What DeepSeek's checkpoint has in F32, by how transformers saves it.
F32 = ("hc_", "attn_sink", ".ape", "gate.bias")


def forward_and_save(folder: Path, note: str) -> bool:
    """Loads in BF16, runs, saves; prints what came of both, and returns whether it ran."""
    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    try:
        logits = model(torch.arange(8)[None]).logits
        ran, said = True, f"runs, finite: {bool(logits.isfinite().all())}"
    except RuntimeError as error:
        ran, said = False, f"{type(error).__name__}: {error}"
    model.save_pretrained(folder / "saved")
    saved = load_file(folder / "saved" / "model.safetensors")
    wanted = [name for name in saved if any(part in name for part in F32)]
    kept = [name for name in wanted if saved[name].dtype == torch.float32]
    print(f"{note}: forward {said}")
    print(f"{note}: {len(kept)} of {len(wanted)} parameters saved in F32")
    return ran


def norm_in_input_dtype(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """DeepseekV4RMSNorm.forward with its result in the dtype of its input, whatever that of its weight."""
    wide = hidden_states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (self.weight * wide).to(hidden_states.dtype)


def main() -> int:
    print(f"transformers {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        DeepseekV4ForCausalLM(DeepseekV4Config(**SMALL)).save_pretrained(folder)
        ran = forward_and_save(folder, "as it is")

        cls = deepseek_v4.DeepseekV4PreTrainedModel
        strict, cls._keep_in_fp32_modules_strict = cls._keep_in_fp32_modules_strict, set()
        forward_and_save(folder, "_keep_in_fp32_modules_strict = set()")
        cls._keep_in_fp32_modules_strict = strict

        deepseek_v4.DeepseekV4RMSNorm.forward = norm_in_input_dtype
        forward_and_save(folder, "norms that return their input's dtype")
    return 1 if ran else 0


if __name__ == "__main__":
    sys.exit(main())
