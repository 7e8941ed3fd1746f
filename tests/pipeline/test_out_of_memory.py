"""out_of_memory: what a user reads when a GPU is full."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import calibrate_arguments, run_here
from synthetic import TINY

from v4forge.errors import UserError
from v4forge.pipeline import out_of_memory

SAID = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which 9.03 GiB"


@pytest.mark.parametrize(
    ("budget", "seq_len", "together", "less"),
    [
        (4096, 512, 4096, "--micro-batch-tokens 2048"),
        (4096, 3000, 4096, "--micro-batch-tokens 3000"),
        (4096, 4096, 4096, "--seq-len 2048"),
        (4096, 8192, 8192, "--seq-len 4096"),
    ],
)
def test_a_full_gpu_is_an_error_with_what_was_asked_and_what_asks_for_less(
    budget: int, seq_len: int, together: int, less: str
) -> None:
    with pytest.raises(UserError) as raised, out_of_memory.explained(budget, seq_len):
        raise torch.OutOfMemoryError(SAID)
    assert "no room for 20.00 GiB more" in raised.value.fact
    assert f"samples of {seq_len} tokens, {together} in a forward pass" in raised.value.fact
    assert less in raised.value.hint and f"SEQ_LEN={seq_len // 2}" in raised.value.hint


def test_calibrate_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr("v4forge.quantization.calibrate.calibrate", full)
    arguments = calibrate_arguments(TINY, tmp_path / "layers", TINY / "calibration.jsonl", samples=2)
    assert run_here("calibrate", *arguments) == 1
    said = capsys.readouterr().err
    assert "error: a GPU has no room for 20.00 GiB more, with samples of 64 tokens, 256 in a forward pass\n" in said
    assert "hint: make … SEQ_LEN=32" in said and "--micro-batch-tokens 128\n" in said


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="another"), out_of_memory.explained(4096, 512):
        raise RuntimeError("another")
