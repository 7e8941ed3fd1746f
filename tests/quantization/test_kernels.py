"""quantization.kernels in Triton's interpreter, on the CPU, against quantization.gptq's torch code. On a GPU:
tests/gpu."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    """What kernel_cases.py prints. A process of its own, because Triton reads the variable when it is imported."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/kernel_cases.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("factor", ["own", "shared"])
def test_a_block_of_the_sweep_is_the_torch_code_s(interpreted: dict[str, dict[str, Any]], factor: str) -> None:
    found = interpreted[factor]
    assert found["blocks"] == 2  # the last one, without anything carried, and one before it
    assert found["codes_equal"] == 1
    assert found["residual_off"] < 1e-5
    assert not found["outside_touched"]


def test_the_searched_scales_are_the_torch_code_s(interpreted: dict[str, dict[str, Any]]) -> None:
    found = interpreted["scales"]
    assert 0.1 < found["negative"] < 0.9
    assert found["equal"] > 0.99
    assert found["worse"] < 1e-3  # another order of adding up may decide between two that are equally good


@pytest.mark.parametrize("kind", ["carried", "output", "transposed"])
def test_the_mixed_streams_are_the_exact_ones(interpreted: dict[str, dict[str, Any]], kind: str) -> None:
    assert interpreted[kind]["off"] < 1e-6


@pytest.mark.parametrize("form", ["sliding", "compressed", "chosen", "many compressed", "too short"])
def test_attention_is_the_exact_one(interpreted: dict[str, dict[str, Any]], form: str) -> None:
    assert interpreted["attended"][form] < 1e-6
