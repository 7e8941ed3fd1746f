"""v4forge.intervals against resampling, published tables and the textbook's formula."""

from __future__ import annotations

import math

import pytest
import torch

from v4forge.intervals import quantile, ratio, share

SEQUENCES = 60


def clustered(seed: int, sequences: int = SEQUENCES) -> tuple[torch.Tensor, torch.Tensor]:
    """Hits and tokens of sequences of different lengths, each with a rate of its own around 0.7."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(20, 80, (sequences,), generator=generator).double()
    rates = 0.7 + 0.3 * (torch.rand(sequences, generator=generator, dtype=torch.float64) - 0.5)
    return torch.binomial(counts, rates, generator=generator), counts


def test_the_error_of_a_chain_of_ratios_is_that_of_resampled_sequences() -> None:
    (a, n), (b, m) = clustered(1), clustered(2)
    b = b / 4 + a / 10  # the two go together, and differ in size
    first, second = ratio(a, n), ratio(b, m)
    figure = (first + first * second).over(2)
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(SEQUENCES, (20_000, SEQUENCES), generator=generator)
    p, q = a[drawn].sum(1) / n[drawn].sum(1), b[drawn].sum(1) / m[drawn].sum(1)
    assert figure.value == pytest.approx(float((a.sum() / n.sum()) * (1 + b.sum() / m.sum()) / 2))
    assert figure.standard_error == pytest.approx(float(((p + p * q) / 2).std()), rel=0.05)


@pytest.mark.parametrize("sequences", [8, 40])
def test_the_intervals_hold_the_truth_in_95_percent_of_draws(sequences: int) -> None:
    draws = 1500
    held = torch.zeros(2)
    for seed in range(draws):
        hits, counts = clustered(seed, sequences)
        ends = share(hits, counts), ratio(hits, counts).interval()
        held += torch.tensor([each.low <= 0.7 <= each.high for each in ends])
    assert (held / draws - 0.95).abs().max() < 0.035  # linearization says a little too little of few sequences


def test_independent_tokens_have_wilsons_interval() -> None:
    found = share(torch.tensor([1.0] * 30 + [0.0] * 10), torch.ones(40))
    t, p, n = quantile(39), 0.75, 39  # of 40 tokens, of which one fixes the mean
    ends = [
        (p + t * t / (2 * n) + sign * t * math.sqrt(p * (1 - p) / n + t * t / (4 * n * n))) / (1 + t * t / n)
        for sign in (-1, 1)
    ]
    assert [found.low, found.high] == pytest.approx(ends)


def test_a_share_of_all_is_not_certain() -> None:
    every = share(torch.full((10,), 5), torch.full((10,), 5))
    assert every.value == every.high == 1 and 0.85 < every.low < 0.95


@pytest.mark.parametrize(("freedom", "t"), [(3, 3.182), (5, 2.571), (15, 2.131), (31, 2.040), (10**6, 1.960)])
def test_students_t_is_the_tables(freedom: int, t: float) -> None:
    assert quantile(freedom) == pytest.approx(t, rel=0.01)


@pytest.mark.parametrize("counts", [[7], [0, 0]])
def test_one_sequence_or_no_token_has_no_interval(counts: list[int]) -> None:
    found = ratio(torch.tensor(counts) // 2, torch.tensor(counts)).interval()
    assert math.isnan(found.low) and found.json()["low"] is None
    assert math.isnan(share(torch.tensor(counts) // 2, torch.tensor(counts)).high)
