"""Tokens a second of a server that answers many requests at a time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from benchmarks.serve_client import Server, greedy

REQUESTS_EACH = 8  # for every request at a time


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids; the first four, which may be special, are left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab_size, (count, length), generator=generator).tolist()


def tokens_a_second(server: Server, concurrency: int, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """So many answers of `count` tokens at a time, to prompts in turn, REQUESTS_EACH for each of them."""
    asked = [prompts[number % len(prompts)] for number in range(REQUESTS_EACH * concurrency)]

    def one(prompt: list[int]) -> int:
        return int(server.post("/v1/completions", greedy(prompt, count))["usage"]["completion_tokens"])

    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(one, asked[:concurrency]))  # the first of a shape may compile
        before = server.drafts()
        begun = time.perf_counter()
        written = sum(pool.map(one, asked))
        taken_s = time.perf_counter() - begun
    steps = server.drafts().since(before)
    return {
        "concurrency": concurrency,
        "requests": len(asked),
        "output_tok_s": written / taken_s,
        "drafts": steps.steps,
        "accepted": list(steps.accepted),
    }
