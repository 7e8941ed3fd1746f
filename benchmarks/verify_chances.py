"""From the statistics of some honest matrices to the chance that a good DeepSeek-V4-Flash leaves verify's bounds.

The tail of slopes is a generalized Pareto distribution, fitted to the largest (Pickands 1975, Annals of Statistics
3:119), with its shape two standard errors heavier. Errors are means over millions of weights: normal. So are shares of
moved codes, in their logarithm. A chance is for a Flash all of whose experts are of one kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from v4forge.verification import tolerances

LAYERS, EXPERTS, HIDDEN, INNER = 43, 256, 4096, 2048  # DeepSeek-V4-Flash
MATRICES = 3 * LAYERS * EXPERTS
ROWS = LAYERS * EXPERTS * (2 * INNER + HIDDEN)
COLUMNS = LAYERS * EXPERTS * (2 * HIDDEN + INNER) // 128  # of groups
GROUPS = MATRICES * INNER * HIDDEN // 128
LEAST_COUNT, LEAST_MEANS = 500, 24  # of values, to say something of a tail
LEAST_DEVIATION = 1e-4
BOUNDS = {  # that the chances are of
    "relative error": tolerances.INT4_RELATIVE_ERROR,
    "slopes": list(tolerances.SLOPES),
    "tolerated rows": tolerances.TOLERATED_ROWS,
    "column share": tolerances.COLUMN_SHARE,
    "moved codes": tolerances.MOVED_CODES,
}
MEANS = ("errors w1, w3", "errors w2", "moved", "equal", "loss off")  # of which all values are kept


def tail(values: Tensor, count: int, bound: float) -> float:
    """The chance that one of `count` such values exceeds the bound. values: the largest of them."""
    from scipy import stats

    k = min(len(values) - 1, count // 4)
    ordered = values.sort(descending=True).values.double()
    beyond, start = (ordered[:k] - ordered[k]).numpy(), float(ordered[k])
    shape, _, scale = stats.genpareto.fit(beyond, floc=0)
    heavier = shape + 2 * (1 + abs(shape)) / math.sqrt(k)
    return float(k / count * stats.genpareto.sf(bound - start, heavier, scale=scale)) if bound > start else 1.0


def beyond(values: Tensor, bound: float) -> float:
    """The chance that one more such value, of a normal distribution, exceeds the bound: Student's t."""
    from scipy import stats

    n, deviation = len(values), max(float(values.double().std()), LEAST_DEVIATION)
    away = (bound - float(values.double().mean())) / (deviation * math.sqrt(1 + 1 / n))
    return float(stats.t.sf(away, n - 1))


def at_least_one(chance: float, count: int) -> float:
    return -math.expm1(count * math.log1p(-min(chance, 1 - 1e-12)))


def described(values: Mapping[str, Tensor], count: Mapping[str, int]) -> dict[str, Any]:
    """Extremes of one kind, and for each statistic the chance that a Flash of nothing else leaves its bound; None where
    there were too few. values: the largest of slopes, and all of MEANS; count: how many there were.
    """
    from scipy import stats

    chance: dict[str, float | None] = dict.fromkeys(("errors", "moved", "rows", "columns"))
    if count["moved"] >= LEAST_MEANS:
        errors = (beyond(values[name], tolerances.INT4_RELATIVE_ERROR) for name in ("errors w1, w3", "errors w2"))
        chance["errors"] = at_least_one(max(errors), MATRICES)
        chance["moved"] = at_least_one(beyond(-values["moved"].log(), -math.log(tolerances.MOVED_CODES)), LAYERS)
    narrower = min(abs(math.log(each)) for each in tolerances.SLOPES)
    one = {
        name: tail(values[name], count[name], narrower) for name in ("rows", "columns") if count[name] >= LEAST_COUNT
    }
    if "rows" in one:  # of a matrix some are tolerated
        more = float(stats.binom.sf(int(INNER * tolerances.TOLERATED_ROWS), INNER, one["rows"]))
        chance["rows"] = at_least_one(more, ROWS // INNER)
    if "columns" in one:
        chance["columns"] = at_least_one(one["columns"], COLUMNS)
    greatest = {name: float(each.max()) for name, each in values.items() if len(each)}
    least, mean = ({name: float(of(values[name])) for name in MEANS} for of in (torch.min, torch.mean))
    told = {"greatest": greatest, "least": least, "mean": mean, "chance_of_one": one, "chance": chance}
    return {"count": count, **told}


def worst(kinds: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """The greatest chance of all kinds, for each statistic."""
    found: dict[str, list[float]] = {}
    for kind in kinds:
        for name, chance in kind["chance"].items():
            found.setdefault(name, []).extend([] if chance is None else [chance])
    return {name: max(chances, default=None) for name, chances in found.items()}
