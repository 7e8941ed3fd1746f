"""The field's words for what the benches measure, as `vllm bench serve` and vLLM's metrics use them."""

from __future__ import annotations

from collections.abc import Iterable

# What is said of each once, where it first stands.
TERMS = {
    "TTFT": "time to first token",
    "TPOT": "time per output token of a request after its first: (end-to-end latency - TTFT) / (output tokens - 1)",
    "ITL": "inter-token latency, the gap between two chunks of a stream; with drafts a chunk is all tokens of a step",
    "goodput": "requests a second that keep to limits on TTFT and TPOT",
    "k": "num_speculative_tokens, the draft tokens of a step",
    "acceptance rate": "accepted draft tokens of all that were proposed; at position i, of the steps, those in which "
    "the draft tokens 1 to i were accepted",
    "acceptance length": "tokens that a step yields, 1 + accepted draft tokens a step",
}


def spelled_out(names: Iterable[str] = TERMS) -> str:
    """One line: TTFT: time to first token. TPOT: …"""
    return " ".join(f"{name}: {TERMS[name]}." for name in names)


def acceptance_length(accepted: float, steps: float) -> float:
    """Tokens that a step yields on average; NaN without a step.

    The model's own token and the draft tokens before it, which vLLM calls the mean acceptance length.
    """
    return 1 + accepted / steps if steps else float("nan")
