"""vLLM: a checkpoint that lacks a tensor loads without a word when the model is quantized, or when the tensor is one
part of a fused parameter.

python vllm_unfilled_weights.py; needs vLLM, on a CPU or a GPU, half a minute. Exit code 0 when a broken checkpoint
loads, 1 when each is refused.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
import transformers
import vllm
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head"],
}


def write_checkpoint(folder: Path, quantized: bool, without: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if quantized:
        for name in [name for name in tensors if "_proj.weight" in name]:
            weight = tensors[name].float()
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().to(torch.int8)
            tensors[name.replace(".weight", ".weight_scale")] = scale
        stated = json.loads((folder / "config.json").read_text()) | {"quantization_config": INT8}
        (folder / "config.json").write_text(json.dumps(stated))
    del tensors[without]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def outcome(quantized: bool, without: str, checked: bool = False) -> str:
    """What vLLM's own loader says to a checkpoint without one tensor."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, quantized, without)
        extra = {"model_loader_extra_config": {"enable_weights_track": True}} if checked else {}
        config = EngineArgs(
            model=name, skip_tokenizer_init=True, enforce_eager=True, use_tqdm_on_load=False, **extra
        ).create_engine_config()
        with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            model = initialize_model(vllm_config=config)
            try:
                get_model_loader(config.load_config).load_weights(model, config.model_config)
            except ValueError as error:
                return f"refused: {error}"
    return "loads"


def main() -> int:
    print(f"vllm {vllm.__version__}, torch {torch.__version__}")
    transformers.utils.logging.disable_progress_bar()
    norm, key = "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"
    broken = []
    for note, case in {
        f"BF16 without {norm}": (False, norm),
        f"INT8 without {norm}": (True, norm),
        f"INT8 without {norm}, enable_weights_track": (True, norm, True),
        f"BF16 without {key}": (False, key),
        f"INT8 without {key}, enable_weights_track": (True, key, True),
    }.items():
        said = outcome(*case)
        broken.append(said == "loads")
        print(f"{note}: {said}")
    return 0 if any(broken) else 1


if __name__ == "__main__":
    sys.exit(main())
