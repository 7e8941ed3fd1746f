"""FP8 weights without AMX: vLLM's CPU kernel for blocks runs there, only its own condition says that it does not."""

from __future__ import annotations


def allow_without_amx() -> None:
    """Drops AMX from what the kernel for FP8 blocks with 16-bit activations asks for."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel

    def is_supported(compute_capability: int | None = None) -> tuple[bool, str | None]:
        there = bool(ops._supports_cpu_fp8_w8a16)
        return there, None if there else "fp8_scaled_mm_cpu op not available."

    CPUFp8BlockScaledMMKernel.is_supported = staticmethod(is_supported)
