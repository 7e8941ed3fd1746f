"""Whether figures of the benches differ: two of them, or several looked at together; and the bootstrap over groups of
requests.

Requests that run together share their steps, so what the bootstrap draws is a group of as many requests as run at a
time, which began one after the other. It is ours and not scipy.stats.bootstrap, which knows no groups, makes one figure
of its draws, and takes the ends of an interval from them as they are: given the groups' numbers as its sample, it would
save the one line that draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from v4forge.intervals import Estimate, quantile

SURE = 0.05  # a two-sided p below it is called a difference

Json = Mapping[str, Any]


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other of independent shares, from their own intervals (Newcombe 1998, Statistics in Medicine 17:873, method
    10): each end is as far from the difference as the two nearer ends together, squared and added.

    scipy.stats has Wilson's intervals, of which it is made, and not this one.
    """
    value = one.value - other.value
    low = value - math.hypot(one.value - one.low, other.high - other.value)
    high = value + math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value, low, high)


def z_test(ours: Json, theirs: Json) -> dict[str, float | None]:
    """How far two shares are apart, {"value", "se"} each -> {"delta": ours - theirs, "se", "p"}.

    p is that of the two-sided z test of no difference, for two independent samples; figures over the same questions
    are alike, so it is if anything too large. None where a standard error is unknown, or both are zero.
    """
    delta = float(ours["value"]) - float(theirs["value"])
    errors = [each.get("se") for each in (ours, theirs)]
    known = [float(error) for error in errors if error is not None and math.isfinite(error)]
    se = math.hypot(*known) if len(known) == len(errors) else None
    p = 2 * NormalDist().cdf(-abs(delta) / se) if se else None
    return {"delta": delta, "se": se, "p": p}


def proportion(right: int, of: int) -> dict[str, float | None]:
    """A share of right answers, with the standard error of a mean as lm-eval has it, of the sample's variance."""
    value = right / of
    return {"value": value, "se": math.sqrt(value * (1 - value) / (of - 1)) if of > 1 else None}


def two_sided(value: float, error: float, freedom: int) -> float | None:
    """p of a value at least so far from zero, by Student's t; None without an error."""
    if math.isnan(error) or freedom < 1:
        return None
    if not error:
        return 1.0 if not value else 0.0
    from scipy import stats  # takes a second, as in v4forge.intervals

    return 2 * float(stats.t.sf(abs(value) / error, freedom))


def holm(values: Sequence[float]) -> float:
    """The largest of these p that is beyond noise together with the smaller ones; below zero when none is."""
    limit = -1.0
    for number, p in enumerate(sorted(values)):
        if p > SURE / (len(values) - number):
            break
        limit = p
    return limit


# The bootstrap.


def drawn(counts: Sequence[int], draws: int, seed: int) -> list[NDArray[np.int64]]:
    """Numbers of groups, drawn with replacement, for runs that have so many: [draws, count] for each, one after the
    other from one generator."""
    random = np.random.default_rng(seed)
    return [random.integers(count, size=(draws, count)) for count in counts]


def resampled(values: ArrayLike, size: int, groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """The values of the drawn groups, [draws, count x size].

    values: of a run's requests, in the order in which they began; groups are of `size` of them, and those behind the
    last whole group are left out. groups: what `drawn` has for the run, [draws, count].
    """
    draws, count = groups.shape
    return np.asarray(values, np.float64)[: count * size].reshape(count, size)[groups].reshape(draws, -1)


def standard_error(figures: NDArray[np.float64], count: int) -> float:
    """That of a figure over `count` groups. figures: what the draws make of it, [draws], which differ a little too
    little, drawn from the groups themselves."""
    return float(np.std(figures)) * math.sqrt(count / (count - 1))


def ends(figures: NDArray[np.float64], count: int) -> tuple[float, float]:
    """Those of the 95% interval of a figure over `count` groups. figures: what the draws make of it, [draws].

    It is the expanded percentile interval, which few groups need (Hesterberg 2015, What Teachers Should Know About the
    Bootstrap).
    """
    tail = NormalDist().cdf(-math.sqrt(count / (count - 1)) * quantile(count - 1))
    low, high = np.percentile(figures, [100 * tail, 100 * (1 - tail)])
    return float(low), float(high)
