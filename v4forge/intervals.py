"""Estimates with their 95% intervals. Tokens of one sequence resemble each other, so a sequence is one observation:
errors are those of a ratio of sums over sequences, by linearization (Cochran, Sampling Techniques, 6.3).

Student's t is scipy's. Wilson's interval is not: scipy.stats.binomtest has it for whole counts and the normal quantile,
and a share over sequences has neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
NORMAL = NormalDist().inv_cdf((1 + LEVEL) / 2)  # LEVEL of a normal distribution lies within so many standard errors


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval; NaN where one sequence or none says nothing of the others."""

    value: float
    low: float
    high: float

    @property
    def least(self) -> float:
        """The lower end, or the value where there is none."""
        return self.value if math.isnan(self.low) else self.low

    @property
    def most(self) -> float:
        """The upper end, or the value where there is none."""
        return self.value if math.isnan(self.high) else self.high

    def mapped(self, rising: Callable[[float], float]) -> Estimate:
        """A rising function of the figure."""
        return Estimate(rising(self.value), rising(self.low), rising(self.high))

    def json(self) -> dict[str, float | None]:
        return {k: None if math.isnan(v) else v for k, v in vars(self).items()}

    @classmethod
    def of(cls, told: Mapping[str, float | None]) -> Estimate:
        """What json() has written. Raises KeyError or TypeError for anything else."""
        ends = (told[end] for end in ("value", "low", "high"))
        return cls(*(math.nan if end is None else float(end) for end in ends))


@dataclass(frozen=True)
class Figure:
    """A function of sums over sequences; to first order it differs from its expectation by the sum of `influence`."""

    value: float
    influence: NDArray[np.float64]  # [sequences], sums to zero

    @property
    def standard_error(self) -> float:
        n = len(self.influence)
        return math.sqrt(n / (n - 1) * float(np.square(self.influence).sum())) if n > 1 else math.nan

    def __add__(self, other: Figure) -> Figure:
        return Figure(self.value + other.value, self.influence + other.influence)

    def __mul__(self, other: Figure) -> Figure:
        return Figure(self.value * other.value, other.value * self.influence + self.value * other.influence)

    def over(self, divisor: float) -> Figure:
        return Figure(self.value / divisor, self.influence / divisor)

    def interval(self) -> Estimate:
        """By Student's t."""
        margin = quantile(len(self.influence) - 1) * self.standard_error
        return Estimate(self.value, self.value - margin, self.value + margin)


def ratio(sums: ArrayLike, counts: ArrayLike) -> Figure:
    """The mean over all tokens; sums: of each sequence's tokens, [sequences], counts: how many. NaN without tokens."""
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    total = float(counts.sum())
    if not total:
        return Figure(math.nan, np.zeros(len(counts)))
    value = float(sums.sum()) / total
    return Figure(value, (sums - value * counts) / total)


def share(hits: ArrayLike, counts: ArrayLike) -> Estimate:
    """hits of counts by sequence, [sequences] each, as a share: Wilson's interval for as many independent tokens as
    would have this error (Korn and Graubard 1998), at most as many as there are; so it stays within 0 to 1."""
    figure = ratio(hits, counts)
    p, n, t = figure.value, float(np.sum(counts)), quantile(len(figure.influence) - 1)
    if math.isnan(p) or math.isnan(t):
        return Estimate(p, math.nan, math.nan)
    variance = p * (1 - p)
    if variance:
        n = min(n, variance / max(figure.standard_error**2, variance / n))
    return wilson(p, n, t)


def wilson(p: float, n: float, z: float = NORMAL) -> Estimate:
    """The share p of n that are independent of each other (Wilson 1927, Journal of the American Statistical Association
    22:209); n need not be whole. z: the quantile that the ends lie at."""
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, middle - margin), min(1.0, middle + margin))


def quantile(freedom: int) -> float:
    """Student's t beyond which 2.5% lie; NaN without a degree of freedom."""
    if freedom < 1:
        return math.nan
    from scipy import stats  # takes a second, which only a figure over sequences is worth

    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))
