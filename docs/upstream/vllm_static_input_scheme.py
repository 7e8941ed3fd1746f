"""vLLM: FP8 block weights without activations to quantize get a scheme whose is_static_input_scheme is None, not False.

python vllm_static_input_scheme.py; needs vLLM, on a CPU, without a model. Exit code 0 when it is None, 1 when False.
Upstream: https://github.com/vllm-project/vllm/pull/43248
"""

import os
import sys
from importlib.metadata import version
from types import SimpleNamespace

os.environ.update(VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
from compressed_tensors.quantization import QuantizationArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors


def main() -> int:
    print(f"vllm {version('vllm')}")
    weights = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    config = compressed_tensors.CompressedTensorsConfig({}, [], "float-quantized")
    settings = VllmConfig()
    settings.model_config = SimpleNamespace(dtype=torch.bfloat16)
    with set_current_vllm_config(settings):
        scheme = config._get_scheme_from_parts(weights, None, format="float-quantized")
    found = scheme.is_static_input_scheme
    print(f"input_activations: null gives {type(scheme).__name__}.is_static_input_scheme = {found}")
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())
