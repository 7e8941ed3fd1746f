"""DeepGEMM: on Hopper its paged MQA logits take 1, 2 or 4 tokens a sequence, so 0, 1 or 3 drafts, and end otherwise.

python c15_deepgemm_next_n.py [FOLDER of deep_gemm]; shows what the compiled extension asserts, of DeepGEMM or the copy
inside vLLM; needs no GPU. With a Hopper GPU it also calls the kernel, with 1 to 5 tokens. Exit code 0 when three tokens
are refused, 1 when they are not, 2 without DeepGEMM.
"""

import importlib.util
import re
import sys
from pathlib import Path

CONDITION = re.compile(rb"next_n == \d(?: or next_n == \d)+")


def folders() -> list[Path]:
    """Where DeepGEMM may be: as named, as a package, inside vLLM. Nothing is imported."""
    if sys.argv[1:]:
        return [Path(sys.argv[1])]
    found = [Path(p) for s in [importlib.util.find_spec("deep_gemm")] if s for p in s.submodule_search_locations or []]
    if spec := importlib.util.find_spec("vllm"):
        found += [Path(place) / "third_party" / "deep_gemm" for place in spec.submodule_search_locations or []]
    return found


def called() -> None:
    """What the kernel says to 1 to 5 tokens of two sequences. Newer copies name it for FP4 too, and take a pair."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("no Hopper GPU: the kernel is not called")
        return
    try:
        import deep_gemm
    except ImportError:
        from vllm.third_party import deep_gemm
    kernel = getattr(deep_gemm, "fp8_fp4_paged_mqa_logits", None)
    heads, size, block = 64, 128, 64
    cache = torch.zeros(8, block, 1, size + 4, dtype=torch.uint8, device="cuda")
    table = torch.arange(8, dtype=torch.int32, device="cuda").view(2, 4)
    for tokens in range(1, 6):
        query = torch.zeros(2, tokens, heads, size, device="cuda").to(torch.float8_e4m3fn)
        weights = torch.zeros(2 * tokens, heads, device="cuda")
        lengths = torch.full((2, tokens), 200, dtype=torch.int32, device="cuda")
        try:
            sms = deep_gemm.get_num_sms() // (2 if tokens == 4 else 1)  # pairs of them share a block of the cache then
            plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, block, sms)
            if kernel:
                kernel((query, None), cache, weights, lengths, table, plan, 256)
            else:
                deep_gemm.fp8_paged_mqa_logits(query, cache, weights, lengths, table, plan, 256, clean_logits=False)
            torch.cuda.synchronize()
            print(f"{tokens} tokens a sequence: taken")
        except Exception as error:
            print(f"{tokens} tokens a sequence: {type(error).__name__}: {str(error).splitlines()[0]}")


def main() -> int:
    stated: set[bytes] = set()
    for folder in folders():
        for extension in sorted(folder.glob("*.so")):
            stated |= set(CONDITION.findall(extension.read_bytes()))
    if not stated:
        print("no DeepGEMM here that states which next_n it takes")
        return 2
    for condition in sorted(stated):
        print(f"asserted: {condition.decode()}")
    if not sys.argv[1:]:
        called()
    return 0 if not any(b"next_n == 3" in condition for condition in stated) else 1


if __name__ == "__main__":
    sys.exit(main())
