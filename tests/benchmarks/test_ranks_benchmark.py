"""benchmarks.ranks: what it makes of spans and layer files, and the whole program with two ranks on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.ranks_figures import layer_walls
from v4forge.profiling import Span
from v4forge.verification.reproduce import equal_codes

CPU = torch.device("cpu")


def test_a_layer_lasts_until_the_next_one_computes_and_the_last_until_all_is_written() -> None:
    spans = [
        Span(-1, "read", "read", 0.0, 0.5),
        Span(0, "decode", "compute", 1.0, 2.0),
        Span(0, "forward 1", "compute", 2.0, 3.0),
        Span(1, "read", "read", 1.5, 2.5),
        Span(1, "decode", "compute", 4.0, 5.0),
        Span(1, "write", "write", 5.0, 7.0),
    ]
    assert layer_walls(spans) == {0: 3.0, 1: 3.0}


def test_codes_are_compared_one_by_one(tmp_path: Path) -> None:
    words = torch.zeros(2, 4, dtype=torch.int32)  # eight codes a word
    other = words.clone()
    other[0, 0] = 0x00000021  # two codes of one byte
    other[1, 3] = 0x70000000
    save_file({"a.weight_packed": words, "a.weight_scale": torch.ones(2)}, tmp_path / "a")
    save_file({"a.weight_packed": other, "a.weight_scale": torch.zeros(2)}, tmp_path / "b")
    assert equal_codes(tmp_path / "a", tmp_path / "b", CPU) == pytest.approx(1 - 3 / 64)


@pytest.mark.soak
def test_two_ranks_are_measured_compared_killed_and_resumed(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "found"
    command = [sys.executable, "-m", "benchmarks.ranks", "--work", work, "--out", out, "--ranks", 1, 2, "--killed"]
    command += ["--small", "--layers", 3, "--samples", 24, "--seq-len", 32, "--device", "cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.with_name("found.json").read_text())
    assert found["ranks"]["2"]["against"] == {"equal_codes": [1.0] * 3, "loss_off": [0.0] * 3, "within": True}
    assert found["ranks"]["2"]["exchange_s"] > 0
    assert found["killed"]["same_bytes"] and found["killed"]["exit_code"] != 0
    assert found["killed"]["layers_finished_before"] == ["layer-000.safetensors"]
