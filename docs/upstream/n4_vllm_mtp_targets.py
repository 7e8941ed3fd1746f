"""vLLM: what a quantization_config says of `mtp.*` does nothing, because inside vLLM the block is `model.layers.43`.

python n4_vllm_mtp_targets.py; needs vLLM, no GPU and no model. Exit code 0 when the block is quantized although it is
on the ignore list, 1 when it is not. The names are those that vLLM 0.26 to 0.33 give the block's modules.
"""

import os
import sys
from importlib.metadata import version

os.environ.update(VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
from vllm.model_executor.layers.quantization.compressed_tensors.utils import find_matched_target, should_ignore_layer

LAYERS = r"(?:[0-9]|[1-3][0-9]|4[0-2])"
TARGETS = {
    "broad": r"re:.*attn\.(wq_a|wq_b|wkv|wo_a|wo_b|fused_wqa_wkv)$",
    "anchored": rf"re:^model\.layers\.{LAYERS}\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|fused_wqa_wkv)$",
}
IGNORE = [r"re:.*mtp\..*"]
MODULES = {"layer 42": "model.layers.42.attn.wo_b", "the MTP block": "model.layers.43.attn.wo_b"}


def quantized(name: str, target: str) -> bool:
    if should_ignore_layer(name, ignore=IGNORE, fused_mapping={}):
        return False
    try:
        return find_matched_target(name, torch.nn.Linear(1, 1), [target], fused_mapping={}) is not None
    except ValueError:
        return False


def main() -> int:
    print(f"vllm {version('vllm')}")
    print(f"ignore: {IGNORE}")
    found = {}
    for kind, target in TARGETS.items():
        for note, name in MODULES.items():
            found[kind, note] = quantized(name, target)
            print(f"{kind} targets, {note}, {name}: {'quantized' if found[kind, note] else 'not quantized'}")
    return 0 if found["broad", "the MTP block"] else 1


if __name__ == "__main__":
    sys.exit(main())
