"""patches/vllm-cpu: what vLLM computes in Triton, in torch. tests/vllm/test_forward.py has the whole in a real vLLM."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "patches" / "vllm-cpu" / "plugin"))

from v4forge_vllm_cpu import changes, metadata, routing  # noqa: E402  (what imports nothing of vLLM)


@dataclass(frozen=True)
class Batch:
    """Requests as vLLM describes them: tokens scheduled and seen of each, first blocks, blocks of 4."""

    scheduled: list[int]
    seen: list[int]

    @property
    def starts(self) -> torch.Tensor:
        return torch.tensor([0, *self.scheduled]).cumsum(0).to(torch.int32)

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor([a + b for a, b in zip(self.scheduled, self.seen, strict=True)], dtype=torch.int32)

    @property
    def blocks(self) -> torch.Tensor:
        """[requests, 12] i32, every block another."""
        return torch.randperm(12 * len(self.seen), generator=torch.Generator().manual_seed(0)).view(-1, 12).int()

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """(place in the batch, request, position) of each token."""
        place = 0
        for request, (scheduled, seen) in enumerate(zip(self.scheduled, self.seen, strict=True)):
            for position in range(seen, seen + scheduled):
                yield place, request, position
                place += 1


BATCHES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=4).map(
    lambda rows: Batch(*map(list, zip(*rows, strict=True)))
)


@given(batch=BATCHES, ratio=st.sampled_from([1, 4]))
@settings(deadline=None)
def test_a_token_that_completes_a_compressed_state_gets_its_slot(batch: Batch, ratio: int) -> None:
    slots = torch.arange(sum(batch.scheduled))
    slots[-1] = metadata.PAD  # cached already
    found = torch.full_like(slots, 7)
    metadata.compressed_slots(
        found, slots, batch.starts, batch.lengths, batch.blocks, 12, 4, 1, 1, ratio, metadata.PAD, 1024
    )
    for place, request, position in batch.tokens():
        done = (position + 1) % ratio == 0 and place != len(slots) - 1
        state = position // ratio
        assert found[place] == (4 * batch.blocks[request, state // 4] + state % 4 if done else metadata.PAD)


@given(batch=BATCHES, ratio=st.sampled_from([1, 4]), slice_=st.tuples(st.integers(0, 5), st.integers(1, 40)))
@settings(deadline=None)
def test_a_token_of_a_chunk_sees_the_compressed_keys_before_it(
    batch: Batch, ratio: int, slice_: tuple[int, int]
) -> None:
    tokens = sum(batch.scheduled)
    start, stop = min(slice_[0], tokens), min(sum(slice_), tokens)
    keys = [int(length) // ratio for length in batch.lengths]
    cumulative = torch.tensor([0, *keys]).cumsum(0).int()
    owners, first, last = torch.full((sum(keys),), -1), torch.full((stop - start,), -1), torch.full((stop - start,), -1)
    metadata.prefill_chunk(
        batch.starts, batch.lengths, cumulative, cumulative, owners, first, last, start, stop, 0, 1, 1, 1024, ratio
    )
    assert owners.tolist() == [request for request, count in enumerate(keys) for _ in range(count)]
    here = [(request, position) for place, request, position in batch.tokens() if start <= place < stop]
    assert (last - first).tolist() == [(position + 1) // ratio for _, position in here]
    if sum(keys):
        found = torch.searchsorted(cumulative, first.int(), right=True) - 1  # as the layer finds a token's request
        assert all(0 <= each < len(keys) for each in found)
    begins = [int(cumulative[request]) for request, _ in here if keys[request]]
    assert [each for each, (request, _) in zip(first.tolist(), here, strict=True) if keys[request]] == begins


@given(batch=BATCHES)
def test_each_token_is_mapped_to_its_request(batch: Batch) -> None:
    tokens = sum(batch.scheduled)
    found = torch.full((tokens + 3,), -1, dtype=torch.int32)
    metadata.token_requests(batch.starts, found, len(batch.seen), tokens, tokens + 2, num_warps=4)
    assert found.tolist() == [request for _, request, _ in batch.tokens()] + [0, 0, -1]


@given(seen=st.lists(st.integers(0, 30), min_size=1, max_size=4), width=st.integers(1, 4))
def test_drafts_become_rows_that_see_one_token_more_each(seen: list[int], width: int) -> None:
    batch = Batch([width] * len(seen), seen)
    rows = len(seen) * width
    lengths, table, ones = torch.zeros(rows + 1), torch.zeros(rows + 1, 14, dtype=torch.int32), torch.zeros(rows + 1)
    metadata.uniform_decode(batch.lengths, lengths, batch.blocks, 12, table, 14, ones, width, BLOCK_SIZE=1024)
    assert lengths.tolist() == [position + 1 for _, _, position in batch.tokens()] + [0]
    assert table[:rows, :12].equal(batch.blocks.repeat_interleave(width, dim=0))
    assert ones.tolist() == [1] * rows + [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_a_setting_of_a_request_is_that_of_its_draft_tokens(dtype: torch.dtype) -> None:
    found = torch.full((4,), 9, dtype=dtype)
    metadata.expand(found, torch.tensor([3, -1, 5], dtype=dtype) / 2, torch.tensor([2, 3, 3]), -0.5, 1, 32)
    expected = [1.5, 1.5, 1.0, 9.0] if dtype.is_floating_point else [1, 1, 1, 9]
    assert found.tolist() == expected


@given(seed=st.integers(0, 99), hashed=st.booleans())
def test_experts_are_chosen_by_score_and_bias_and_weighed_by_score(seed: int, hashed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    table = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(20)]).int()
    words = torch.randint(20, (5,), generator=generator)
    weights, chosen = routing.route(logits, 2, True, None if hashed else bias, 1.5, words, table if hashed else None)
    for token in range(5):
        scores = [math.sqrt(math.log1p(math.exp(logit))) for logit in logits[token].tolist()]
        best = sorted(range(8), key=lambda expert: -(scores[expert] + float(bias[expert])))[:2]
        assert set(chosen[token].tolist()) == set(table[words[token]].tolist() if hashed else best)
        picked = [scores[expert] for expert in chosen[token].tolist()]
        assert weights[token].tolist() == pytest.approx([1.5 * score / sum(picked) for score in picked], rel=1e-5)


def test_engine_and_worker_sleep_while_they_wait_for_each_other() -> None:
    shm_broadcast = ModuleType("shm_broadcast")
    changes.waiting(shm_broadcast)
    begun_s, computed_s = time.monotonic(), time.process_time()
    for _ in range(100):
        shm_broadcast.sched_yield()
    assert time.process_time() - computed_s < (time.monotonic() - begun_s) / 2
