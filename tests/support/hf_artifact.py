"""What llm-compressor really saves: oneshot and save_pretrained of a checkpoint, in the forms that people end up with.

`python tests/support/hf_artifact.py BF16 OUT` writes OUT/<form> for each of FORMS, from what scripts.dequant wrote.
`save` does both; the saving in a process of its own, because the libraries keep global state. No network; 15 s for
models/tiny, which is why what came is kept, as long as nothing that determines it changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import once
import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERTS = {
    "targets": [r"re:.*mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)$"],
    "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True},
}
ATTENTION = {
    "targets": [r"re:.*self_attn\.(q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)$"],
    "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
}


@dataclass(frozen=True)
class Form:
    """One way to get there. `keep_f32` False is the documented workaround that makes a forward pass run (C13)."""

    gptq: bool = False
    attention: bool = False  # quantized to FP8 anew, or left in BF16
    keep_f32: bool = False
    symmetric: bool = True
    load_mapping: bool = False  # names as after llm-compressor's load_quantizable_moe
    save: dict[str, Any] = field(default_factory=dict)


FORMS = {
    "hybrid": Form(),
    "gptq": Form(gptq=True, attention=True, load_mapping=True),
    "hf": Form(attention=True, keep_f32=True, save={"save_original_format": False, "max_shard_size": "4MB"}),
    "asymmetric": Form(symmetric=False),
}


def save(source: Path, out: Path, cache: pytest.Cache) -> None:
    """Writes every form of an upstream checkpoint into `out`."""
    from v4forge.checkpoint.reader import Checkpoint
    from v4forge.quantization.dequant import dequantize

    bf16 = out / "bf16"
    dequantize(Checkpoint(source), bf16, "")
    determining = [Path(__file__), ROOT / "docker/requirements-calib.txt", *sorted(bf16.iterdir())]
    parts = [sys.version.encode(), *(path.read_bytes() for path in determining if path.is_file())]
    made = once.kept(cache, "llm-compressor", parts, lambda folder: _save(bf16, folder))
    shutil.copytree(made, out, dirs_exist_ok=True)


def _save(bf16: Path, out: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "LLM_COMPRESSOR_LOG_DISABLED": "false"}
    command = [sys.executable, __file__, str(bf16), str(out)]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def save_with_llmcompressor(bf16: Path, out: Path, form: Form) -> None:
    """`bf16`: a checkpoint with upstream names and no quantization_config, which transformers can load."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.conversion_mappings import get_linearize_load_mappings, set_save_conversion_mapping
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4PreTrainedModel

    strict = DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict
    if not form.keep_f32:
        DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict = set()
    model = AutoModelForCausalLM.from_pretrained(bf16, dtype=torch.bfloat16)
    DeepseekV4PreTrainedModel._keep_in_fp32_modules_strict = strict
    # load_quantizable_moe would do both at load; it imports every image processor and so needs torchvision
    linearize_moe(model)
    if form.load_mapping:
        set_save_conversion_mapping(model, get_linearize_load_mappings("deepseek_v4")[2])
    groups = {"experts": EXPERTS | {"weights": EXPERTS["weights"] | {"symmetric": form.symmetric}}}
    if form.attention:
        groups["attention"] = ATTENTION
    if form.gptq:
        tokens = torch.randint(0, 1024, (8, 64), generator=torch.Generator().manual_seed(0))
        samples = Dataset.from_list([{"input_ids": row.tolist(), "attention_mask": [1] * 64} for row in tokens])
        recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
        data = {"dataset": samples, "max_seq_length": 64, "num_calibration_samples": len(samples)}
        oneshot(
            model=model, recipe=recipe, pipeline="sequential", sequential_targets=["DeepseekV4DecoderLayer"], **data
        )
    else:
        oneshot(model=model, recipe=QuantizationModifier(config_groups=groups, ignore=["lm_head"]), pipeline="datafree")
    model.save_pretrained(out, **form.save)


if __name__ == "__main__":
    for name in FORMS:
        save_with_llmcompressor(Path(sys.argv[1]), Path(sys.argv[2], name), FORMS[name])
