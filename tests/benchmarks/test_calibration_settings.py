"""benchmarks.calibration_settings: the texts it mixes, and the rows it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import calibration_settings, calibration_texts
from benchmarks.calibration_texts import KINDS
from benchmarks.lab import demo_tokens
from v4forge.files import read_json


def test_nothing_that_is_judged_was_calibrated_on() -> None:
    for kind in KINDS[1:]:
        calibrated = set(calibration_texts.calibration(kind))
        everything = set(calibration_texts.documents()[kind])
        assert calibrated < everything
        held = calibration_texts.held_back(kind, 64)
        assert held.shape[1] == 64 and held.numel() <= sum(map(len, everything - calibrated))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mix_is_of_equal_parts_and_its_draw_follows_from_the_seed(seed: int) -> None:
    kinds = ("texts", "chats", "tool calls")
    made = calibration_texts.mixed(kinds, 24, 256, seed)
    assert torch.equal(made, calibration_texts.mixed(kinds, 24, 256, seed))
    assert not torch.equal(made, calibration_texts.mixed(kinds, 24, 256, seed + 1))
    first, second, _ = made.flatten().split(24 * 256 // 3)
    for part, kind in ((first, "texts"), (second, "chats")):
        alone = calibration_texts.mixed((kind,), 8, 256, seed).flatten()
        assert torch.equal(part[: len(alone)], alone[: len(part)])


def test_what_a_kind_lacks_is_of_the_others() -> None:
    made = calibration_texts.mixed(("texts", "tool calls"), 64, 256, 0)
    tools = sum(map(len, calibration_texts.calibration("tool calls")))
    assert tools < 32 * 256 and made.shape == (64, 256)


def test_lengths_are_cut_of_the_same_tokens() -> None:
    long, short = demo_tokens(2, 3, 2048), demo_tokens(32, 3, 128)
    assert torch.equal(long.flatten(), short.flatten())


@pytest.mark.soak  # the whole program
def test_a_run_writes_every_setting_beside_the_present_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "settings.json"
    monkeypatch.setattr(calibration_settings, "TOKENS", (512,))
    monkeypatch.setattr(calibration_settings, "LENGTHS", (256, 128))
    monkeypatch.setattr(calibration_settings, "HELDOUT", {"64 tokens": (4, 64), "128 tokens": (2, 128)})
    monkeypatch.setattr("sys.argv", ["settings", "--parts", "length", "--draws", "2", "--out", str(out)])
    calibration_settings.main()
    rows = read_json(out)["rows"]
    told = [(row["setting"], row["held_out"]) for row in rows]
    assert told == [(f"{n} tokens a sample", where) for n in (256, 128) for where in ("64 tokens", "128 tokens")]
    assert rows[0]["against_present"]["value"] == 1 and rows[0]["draws"] == [1, 1]
    assert 0.7 < rows[2]["against_present"]["value"] < 1.4 and len(rows[2]["draws"]) == 2
