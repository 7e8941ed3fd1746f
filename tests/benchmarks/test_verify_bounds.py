"""benchmarks/verify_bounds.py measures what verify judges, and docs/verify.md states what it found."""

from __future__ import annotations

import json
import math

import pytest
import torch
from programs import ROOT

from benchmarks import verify_bounds, verify_chances
from v4forge.checkpoint import codec
from v4forge.quantization import gptq
from v4forge.verification import reference, tolerances

RESULTS = json.loads((ROOT / "benchmarks/results/verify-bounds-cpu.json").read_text())
WHICH = {"errors": "expert errors", "rows": "expert slopes", "columns": "expert slopes", "moved": "rounding"}


def test_the_statistics_are_those_that_verify_judges() -> None:
    torch.manual_seed(0)
    weights = verify_bounds.source(verify_bounds.lognormal_groups, 1, 64, 512)
    found = gptq.round_to_nearest(weights, gptq.absmax_scales(weights))
    stored = codec.encode_fp4(weights[0])
    matrix = reference.compared(codec.encode_int4(found.codes[0], found.scale[0]), stored)
    measured = verify_bounds.statistics(weights, found)
    assert float(measured["errors"]) == pytest.approx(matrix.error, rel=1e-4)
    for name, ends in (("rows", matrix.rows), ("columns", matrix.columns)):
        assert float(measured[name].max()) == pytest.approx(max(abs(math.log(end)) for end in ends), rel=1e-3)
    assert float(measured["moved"]) == 0 == matrix.moved


def test_a_tail_is_continued_and_rather_too_heavy_than_too_light() -> None:
    torch.manual_seed(0)
    values = torch.distributions.Exponential(1.0).sample((100_000,))
    found = verify_chances.tail(values.topk(1001).values, len(values), 20.0)
    assert math.exp(-20) < found < 1e4 * math.exp(-20)
    assert verify_chances.tail(values.topk(1001).values, len(values), 1.0) == 1.0


@pytest.mark.parametrize("figure", WHICH)
def test_the_stated_chance_is_not_below_the_measured_one(figure: str) -> None:
    kinds = {name: kind for name, kind in RESULTS["kinds"].items() if not name.startswith(tolerances.UNBOUNDED)}
    assert len(kinds) == 24
    assert verify_chances.worst(kinds.values())[figure] <= tolerances.RISKS[WHICH[figure]].chance


def test_the_figures_are_of_the_bounds_as_they_are() -> None:
    assert RESULTS["bounds"] == verify_chances.BOUNDS
    assert RESULTS["groups"] >= 1e6
    assert min(kind["mean"]["equal"] for kind in RESULTS["kinds"].values()) > tolerances.REPLAY_EQUAL_CODES
    off = max(abs(kind[end]["loss off"]) for kind in RESULTS["kinds"].values() for end in ("least", "greatest"))
    assert off < tolerances.REPLAY_LOSS_OFF
