"""hints: a command of make says which work folder it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from v4forge.checkout import ROOT
from v4forge.pipeline import make_hints


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ("make postprocess verify card", "make postprocess verify card PROFILE=flash SCRATCH=/data"),
        (
            "make fetch, or make card",
            "make fetch PROFILE=flash SCRATCH=/data, or make card PROFILE=flash SCRATCH=/data",
        ),
        ("move x, then: make bench-speed", "move x, then: make bench-speed PROFILE=flash SCRATCH=/data"),
        ("make lock-check", "make lock-check"),
        (
            "make images IMAGE=calib && make push REGISTRY=<host>/<path>, then",
            "make images IMAGE=calib SCRATCH=/data && make push REGISTRY=<host>/<path> SCRATCH=/data, then",
        ),
        ("make verify PROFILE=tiny", "make verify PROFILE=tiny SCRATCH=/data"),
        ("make cards", "make cards"),
    ],
)
def test_commands_for_a_work_folder_name_it_and_others_stay(hint: str, said: str) -> None:
    assert make_hints.for_work(hint, Path("/data/flash")) == said


def test_the_folder_of_makes_defaults_needs_no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert make_hints.for_work("make verify", Path("scratch/tiny")) == "make verify"
    assert make_hints.for_work("make verify", ROOT / "scratch/flash") == "make verify PROFILE=flash"


def test_a_folder_that_is_no_profiles_is_none_that_make_can_be_sent_to() -> None:
    assert make_hints.for_work("make verify", Path("/data/mine")) == "make verify"
