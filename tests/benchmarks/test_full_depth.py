"""benchmarks.full_depth: what it serves, what it makes of the times, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import full_depth
from benchmarks.full_depth_serving import ACCEPTED, PUBLISHED, Case, beside, cases
from v4forge.checkout import ROOT
from v4forge.errors import UserError

STAND_IN = ROOT / "tests/support/vllm_stand_in.py"


def test_both_folders_are_served_alike() -> None:
    pairs = list(cases([0, 2], ["", "marlin"]))
    assert [[case.name for case in pair] for pair in pairs] == [
        ["artifact-k0", "upstream-k0"],
        ["artifact-k0-marlin", "upstream-k0-marlin"],
        ["artifact-k2", "upstream-k2"],
    ]


def test_a_ratio_is_prompt_by_prompt() -> None:
    """Prompts differ by more than the two servers do."""
    theirs = [1.0, 4.0, 9.0, 2.0]
    found = beside([0.9 * each for each in theirs], theirs)
    assert (found.value, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))


def run(work: Path, *more: str) -> int:
    words = ["--work", work, "--out", work / "out.json", "--layers", 4, "--stages", "serve", "--device", "cpu"]
    sizes = ["--streams", 3, "--tokens", 8, "--prompt-tokens", 6, "--concurrency", 1, "--limit", 30]
    given = ["full_depth", *map(str, [*words, *sizes, "--vllm", f"{sys.executable} {STAND_IN}"]), *more]
    with mock.patch.object(sys, "argv", given):
        return full_depth.main()


def test_servers_are_measured_once_and_a_failed_one_again(rounded: Path, tmp_path: Path) -> None:
    for folder, target in (("upstream", ROOT / "models/tiny"), ("artifact", rounded / "artifact")):
        (tmp_path / folder).symlink_to(target)
    assert run(tmp_path, "--drafts", "0", "--backends", "", "--set", "max-num-seqs=0") == 1
    assert run(tmp_path, "--drafts", "0", "1", "--backends", "", "--together") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in found["servers"]] == [
        Case(folder, k, "").name for k in (0, 1) for folder in ("artifact", "upstream")
    ]
    drafting = found["servers"][2]
    rates = dict(zip(drafting["arguments"][::2], drafting["arguments"][1::2], strict=False))
    assert json.loads(rates["--speculative-config.synthetic_acceptance_rates"]) == [ACCEPTED[0]]
    step = drafting["medians"]["step_ms"]
    assert drafting["token_ms_by_text"]["chat"] == pytest.approx(step / (1 + PUBLISHED["chat"]))
    with pytest.raises(UserError, match="another run"):
        run(tmp_path, "--layers", "5")
    before = found["servers"]
    assert run(tmp_path, "--drafts", "0", "1", "--backends", "") == 0
    assert json.loads((tmp_path / "out.json").read_text())["servers"] == before
