"""v4forge.bench.statistics against published examples and tables, scipy, and loops written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from v4forge.bench.statistics import (
    difference,
    drawn,
    ends,
    holm,
    proportion,
    resampled,
    standard_error,
    two_sided,
    z_test,
)
from v4forge.intervals import Estimate

shares = st.floats(0, 1)
errors = st.floats(1e-4, 0.2)


def wilson(hits: int, of: int) -> Estimate:
    z, p = 1.959964, hits / of
    middle, margin = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return Estimate(p, (middle - margin) / (1 + z * z / of), (middle + margin) / (1 + z * z / of))


@pytest.mark.parametrize(
    ("one", "other", "interval"),
    [
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((5, 56), (0, 29), (-0.0381, 0.1926)),
        ((10, 10), (0, 10), (0.6075, 1.0000)),
    ],
)
def test_a_difference_has_the_interval_of_newcombes_paper(
    one: tuple[int, int], other: tuple[int, int], interval: tuple[float, float]
) -> None:
    """Examples of its table II, method 10."""
    found = difference(wilson(*one), wilson(*other))
    assert found.value == one[0] / one[1] - other[0] / other[1]
    assert [found.low, found.high] == pytest.approx(interval, abs=5e-5)


def figure(value: float, se: float | None) -> dict[str, Any]:
    return {"value": value, "se": se}


def test_the_published_gsm8k_figure_does_not_differ_from_itself() -> None:
    assert z_test(figure(0.9371, 0.0067), figure(0.9371, 0.0067))["p"] == 1


def test_a_difference_of_1_96_standard_errors_has_a_p_of_5_percent() -> None:
    found = z_test(figure(0.80, 0.03), figure(0.80 - 1.959964 * 0.05, 0.04))
    assert found["se"] == pytest.approx(0.05)
    assert found["p"] == pytest.approx(0.05, abs=1e-6)


@given(shares, errors, shares, errors)
def test_p_is_that_of_the_normal_distribution_and_the_same_both_ways(a: float, s: float, b: float, t: float) -> None:
    one, other = z_test(figure(a, s), figure(b, t)), z_test(figure(b, t), figure(a, s))
    assert one["p"] == pytest.approx(math.erfc(abs(a - b) / math.sqrt(2 * (s * s + t * t))), abs=1e-12)
    assert one["p"] == pytest.approx(other["p"]) and one["delta"] == -(other["delta"] or 0)


@pytest.mark.parametrize(("ours", "theirs"), [(None, 0.01), (0.01, None), (0.0, 0.0), (math.nan, 0.1)])
def test_an_unknown_standard_error_gives_no_p(ours: float | None, theirs: float | None) -> None:
    assert z_test(figure(0.5, ours), figure(0.4, theirs))["p"] is None


def test_the_standard_error_of_a_share_is_the_published_one_of_humaneval() -> None:
    assert proportion(139, 164) == {
        "value": pytest.approx(0.8475609756097561),
        "se": pytest.approx(0.028153977176919327),
    }


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_names_what_the_textbook_does(values: list[float]) -> None:
    order = sorted(range(len(values)), key=lambda number: values[number])
    rejected = set()
    for rank, number in enumerate(order):
        if values[number] > 0.05 / (len(values) - rank):
            break
        rejected.add(number)
    limit = holm(values)
    assert {number for number, p in enumerate(values) if p <= limit} >= rejected
    assert all(values[number] <= limit for number in rejected) and len([p for p in values if p < limit]) <= len(
        rejected
    )


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [
        (12.706, 1, 0.05),
        (2.571, 5, 0.05),
        (2.262, 9, 0.05),
        (3.250, 9, 0.01),
        (2.045, 29, 0.05),
        (1.984, 100, 0.05),
        (1.383, 9, 0.2),
    ],
)
def test_p_is_that_of_the_tables_of_students_t(t: float, freedom: int, p: float) -> None:
    assert two_sided(t, 1.0, freedom) == two_sided(-t, 1.0, freedom) == pytest.approx(p, rel=1e-3)


def test_p_of_one_degree_of_freedom_is_cauchys() -> None:
    assert two_sided(3.0, 2.0, 1) == pytest.approx(1 - 2 / math.pi * math.atan(1.5), rel=1e-12)


def test_p_without_an_error_is_certain_or_unknown() -> None:
    assert two_sided(0.1, math.nan, 5) is two_sided(0.1, 1.0, 0) is None
    assert (two_sided(0.0, 0.0, 5), two_sided(0.1, 0.0, 5)) == (1.0, 0.0)


# The bootstrap.


def test_a_seed_draws_what_it_always_has() -> None:
    """Intervals in result files are of these draws."""
    one, other = drawn([8, 5], draws=2, seed=42)
    assert one.tolist() == [[0, 6, 5, 3, 3, 6, 0, 5], [1, 0, 4, 7, 5, 6, 5, 6]]
    assert other.tolist() == [[2, 0, 4, 2, 2], [1, 0, 4, 3, 3]]


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 4), st.integers(0, 2**32))
def test_requests_are_drawn_with_all_of_their_group(count: int, size: int, more: int, seed: int) -> None:
    values = [float(number) for number in range(count * size + min(more, size - 1))]
    (groups,) = drawn([count], draws=3, seed=seed)
    expected = [[value for group in draw for value in values[group * size : (group + 1) * size]] for draw in groups]
    assert resampled(values, size, groups).tolist() == expected


def test_of_single_requests_the_figures_are_scipys() -> None:
    values, count, seed = np.random.default_rng(7).gamma(9, 1 / 9, 12), 12, 3
    (groups,) = drawn([count], draws=5000, seed=seed)
    figures = resampled(values, 1, groups).mean(axis=1)
    tail = stats.norm.cdf(-math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1))
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=5000,
        batch=5000,
        confidence_level=1 - 2 * tail,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    assert ends(figures, count) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-9)
    assert standard_error(figures, count) == pytest.approx(theirs.standard_error * math.sqrt(12 / 11), rel=1e-3)


def test_a_mean_of_groups_has_the_error_of_a_mean_of_their_means() -> None:
    random = np.random.default_rng(5)
    of_groups = random.normal(10, 1, 16)
    values = np.repeat(of_groups, 4)  # requests that run together take the same time
    (groups,) = drawn([16], draws=20_000, seed=0)
    error = standard_error(resampled(values, 4, groups).mean(axis=1), 16)
    assert error == pytest.approx(of_groups.std(ddof=1) / 4, rel=0.02)
