"""`--baseline` of the benches and `BASELINE=` of make: what is measured after the artifact, and where that goes."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from keeper_stand_in import install, steps, wanted
from programs import run_here

from scripts import benching
from scripts.bench import parse
from v4forge.checkout import ROOT
from v4forge.serving import launch
from v4forge.serving.launch import Start

TINY = ROOT / "models/tiny"


def test_the_baseline_is_measured_alike_but_for_folder_place_and_certificate(tmp_path: Path) -> None:
    words = ["tools", "--artifact", "a", "--baseline", str(TINY), "--reports", str(tmp_path), "--drafts", "2"]
    given = parse([*words, "--limit", "3", "--allow", "cut", "--set", "max-model-len=8192"])
    ours, theirs = benching.session_of(given), benching.session_of(benching.of_baseline(given))
    assert theirs.wanted.artifact == TINY and theirs.reports == tmp_path / "baseline"
    assert list(theirs.start.allow) == ["cut", "certificate"] and list(ours.start.allow) == ["cut"]
    assert vars(theirs.wanted) == {**vars(ours.wanted), "artifact": TINY}
    assert (theirs.limit, theirs.seed, theirs.command) == (ours.limit, ours.seed, ours.command)


def test_a_bench_goes_on_with_its_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["speed", "--dry-run", "--baseline", TINY, "--artifact", TINY, "--reports", tmp_path / "none"]
    assert run_here("bench", *words) == 0
    said = capsys.readouterr().out
    assert said.count("a server each with k = 0, 1, 2 and 3") == 2 and f"\nspeed: baseline {TINY}\n" in said


@pytest.mark.parametrize(
    ("words", "fact", "hint"),
    [
        (
            ["--baseline", "/nowhere"],
            "there is no checkpoint in /nowhere: no config.json",
            "make bench-tools BASELINE=",
        ),
        (
            ["--baseline", str(TINY), "--url", "http://127.0.0.1:1"],
            "a baseline is served here",
            "leave one of them out",
        ),
    ],
)
def test_a_baseline_that_cannot_be_served_is_told_before_anything_is_measured(
    words: list[str], fact: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("bench", "tools", *words, "--reports", tmp_path / "none") == 1
    said = capsys.readouterr().err.splitlines()
    assert fact in said[-2] and hint in said[-1] and not (tmp_path / "none").exists()


def test_a_deployment_that_runs_is_not_measured_as_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch)
    own = wanted(tmp_path)
    launch.up(launch.deployment_of(own), "", Start(), steps)
    assert run_here("bench", "draft", "--folder", own.folder, "--baseline", TINY, "--reports", tmp_path / "none") == 1
    assert "and the baseline is served in its place\nhint: make serve-stop" in capsys.readouterr().err


def test_make_bench_measures_all_of_the_artifact_and_then_all_of_the_baseline(tmp_path: Path) -> None:
    (tmp_path / "up stream").mkdir()
    (tmp_path / "up stream/config.json").write_text("{}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    words = ["make", "-n", "bench", f"BASELINE={tmp_path}/up stream", "SCRATCH=s", "ALLOW=cut", "ARTIFACT=a"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    runs = re.findall(r"scripts\.(bench \w+|serve up|serve stop|report) (.*)", done.stdout)
    once = ["bench speed", "serve up", "bench draft", "bench quality", "bench tools"]
    assert [name for name, _ in runs] == [*once, "serve stop", *once, "report", "serve stop"]
    for name, options in runs:
        if name in once:
            of_baseline = f"--artifact '{tmp_path}/up stream'" in options
            assert of_baseline == ("--allow cut certificate" in options) and "--baseline" not in options
            assert of_baseline != ("--artifact 'a'" in options)
            if name != "serve up":
                assert of_baseline == ("--reports 's/tiny/reports/baseline'" in options)
    assert sum("up stream" in options for _, options in runs) == 5


def test_make_bench_tells_of_a_baseline_that_is_none_before_it_serves() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    words = ["make", "bench", "BASELINE=/nowhere"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(
        "error: there is no checkpoint in BASELINE=/nowhere: no config.json\nhint: make bench"
    )
