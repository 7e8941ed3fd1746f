"""vLLM on a CPU: with drafts, the temperature of a request is lost. One value a request becomes one a draft token in a
kernel that takes every tensor for integers, and writes into a copy that is thrown away.

python vllm_cpu_expand.py; needs vLLM's CPU build. Exit code 0 when temperatures are lost, 1 when they are expanded.
"""

import os
import sys
from importlib.metadata import version

os.environ.update(VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
import vllm._C  # noqa: F401  the kernel
from vllm.utils.cpu_triton_utils import _expand_kernel_impl


def main() -> int:
    print(f"vllm {version('vllm')}, torch {torch.__version__}")
    counts = torch.tensor([2, 5], dtype=torch.int32)  # two draft tokens of the first request, three of the second
    found = {}
    for note, values in {"top_k": torch.tensor([20, 50]), "temperature": torch.tensor([0.7, 1.5])}.items():
        output = torch.full((5,), -1, dtype=values.dtype)
        _expand_kernel_impl(output, values, counts, 0, 1, MAX_NUM_TOKENS=32)
        wanted = values.repeat_interleave(torch.tensor([2, 3]))
        found[note] = bool(torch.equal(output, wanted))
        shown = ", ".join(f"{value:g}" for value in output.tolist())
        print(f"{note} {[round(v, 1) for v in values.tolist()]}, an output of -1 becomes: {shown}")
    return 1 if found["temperature"] else 0


if __name__ == "__main__":
    sys.exit(main())
