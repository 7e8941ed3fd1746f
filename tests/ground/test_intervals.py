"""v4forge.intervals against resampling, published tables, scipy and the textbook's formula."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from v4forge.checkout import ROOT
from v4forge.intervals import NORMAL, quantile, ratio, share, wilson

SEQUENCES = 60


def clustered(seed: int, sequences: int = SEQUENCES) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Hits and tokens of sequences of different lengths, each with a rate of its own around 0.7."""
    random = np.random.default_rng(seed)
    counts = random.integers(20, 80, sequences)
    hits = random.binomial(counts, 0.7 + 0.3 * (random.random(sequences) - 0.5))
    return hits.astype(np.float64), counts.astype(np.float64)


def test_the_error_of_a_chain_of_ratios_is_that_of_resampled_sequences() -> None:
    (a, n), (b, m) = clustered(1), clustered(2)
    b = b / 4 + a / 10  # the two go together, and differ in size
    first, second = ratio(a, n), ratio(b, m)
    figure = (first + first * second).over(2)
    drawn = np.random.default_rng(3).integers(SEQUENCES, size=(20_000, SEQUENCES))
    p, q = a[drawn].sum(1) / n[drawn].sum(1), b[drawn].sum(1) / m[drawn].sum(1)
    assert figure.value == pytest.approx(float((a.sum() / n.sum()) * (1 + b.sum() / m.sum()) / 2))
    assert figure.standard_error == pytest.approx(float(((p + p * q) / 2).std(ddof=1)), rel=0.05)


@pytest.mark.parametrize("sequences", [8, 40])
def test_the_intervals_hold_the_truth_in_95_percent_of_draws(sequences: int) -> None:
    draws = 1500
    held = np.zeros(2)
    for seed in range(draws):
        hits, counts = clustered(seed, sequences)
        both = share(hits, counts), ratio(hits, counts).interval()
        held += [each.low <= 0.7 <= each.high for each in both]
    assert abs(held / draws - 0.95).max() < 0.035  # linearization says a little too little of few sequences


def test_independent_tokens_have_wilsons_interval() -> None:
    found = share([1.0] * 30 + [0.0] * 10, np.ones(40))
    t, p, n = quantile(39), 0.75, 39  # of 40 tokens, of which one fixes the mean
    ends = [
        (p + t * t / (2 * n) + sign * t * math.sqrt(p * (1 - p) / n + t * t / (4 * n * n))) / (1 + t * t / n)
        for sign in (-1, 1)
    ]
    assert [found.low, found.high] == pytest.approx(ends)


def test_a_share_of_all_is_not_certain() -> None:
    every = share(np.full(10, 5), np.full(10, 5))
    assert every.value == every.high == 1 and 0.85 < every.low < 0.95


@pytest.mark.parametrize(
    ("hits", "of", "interval"),
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilsons_interval_is_the_published_one(hits: int, of: int, interval: tuple[float, float]) -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    found = wilson(hits / of, of)
    assert (found.low, found.high) == pytest.approx(interval, abs=6e-5)


@given(st.integers(1, 10_000).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_of_whole_counts_wilsons_interval_is_scipys(counted: tuple[int, int]) -> None:
    hits, of = counted
    theirs = stats.binomtest(hits, of).proportion_ci(method="wilson")
    found = wilson(hits / of, of)
    assert (found.low, found.high) == pytest.approx(tuple(theirs), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (15, 2.131), (31, 2.040), (10**6, 1.960)]
)
def test_students_t_is_the_tables(freedom: int, t: float) -> None:
    assert quantile(freedom) == pytest.approx(t, abs=5e-4)


def test_the_normal_quantile_is_the_tables() -> None:
    assert pytest.approx(1.959964, abs=5e-7) == NORMAL


@pytest.mark.parametrize("counts", [[7], [0, 0]])
def test_one_sequence_or_no_token_has_no_interval(counts: list[int]) -> None:
    hits = np.array(counts) // 2
    found = ratio(hits, counts).interval()
    assert math.isnan(found.low) and found.json()["low"] is None
    assert math.isnan(share(hits, counts).high)


@pytest.mark.parametrize(
    "module", ["intervals", "bench.statistics", "bench.acceptance", "bench.comparison", "bench.speed"]
)
def test_figures_load_without_torch_and_without_scipy(module: str) -> None:
    """Torch takes seconds to import, scipy.stats one: who only reads figures needs neither."""
    code = f"import sys, v4forge.{module}; sys.exit(bool({{'torch', 'scipy.stats'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
