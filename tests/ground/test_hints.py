"""A hint's commands of make are complete: with what make was given of the artifact, its place, and what runs it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from v4forge import hints, makefile
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.outcomes import failed

GIVEN = "PROFILE=flash 'SCRATCH=/a b' RUNTIME=host ARTIFACT=/c SAMPLES=8 'DEVICES=0'"


@pytest.fixture(params=["beside the Makefile", "in a container"])
def given(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(makefile.GIVEN, GIVEN)
    if request.param == "in a container":
        for name, value in makefile.passed_on().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(makefile, "MAKEFILE", Path("/nowhere"))


@pytest.mark.parametrize(
    ("hint", "whole"),
    [
        ("make verify", "make verify PROFILE=flash SCRATCH='/a b' RUNTIME=host"),
        ("first make fetch, then: make serve", "first make fetch {stage}, then: make serve {serve}"),
        ("make card report (PROFILE is read)", "make card report {stage} (PROFILE is read)"),
        ("make fetch PROFILE=tiny FROM=<a folder>.", "make fetch PROFILE=tiny FROM=<a folder> {rest}."),
        ("make calibrate CORPUS=hub:<a>/<b>@<c>,split=<d>", "make calibrate CORPUS=hub:<a>/<b>@<c>,split=<d> {stage}"),
        ('make serve SET="a=1 b=2" ALLOW=cut', 'make serve SET="a=1 b=2" ALLOW=cut {serve}'),
        ("make demo", "make demo SCRATCH='/a b' RUNTIME=host"),
        ("make lint, make sure of it, make … SCRATCH=<folder>", "make lint, make sure of it, make … SCRATCH=<folder>"),
        ("make env and try again", "make env and try again"),
    ],
)
def test_commands_get_what_their_goals_read_and_do_not_say(given: None, hint: str, whole: str) -> None:
    rest = "SCRATCH='/a b' RUNTIME=host"
    expected = whole.format(
        stage=f"PROFILE=flash {rest}", serve="PROFILE=flash SCRATCH='/a b' ARTIFACT=/c RUNTIME=host", rest=rest
    )
    assert UserError("x", hint).hint == expected == failed("x", hint).fix
    assert UserError("x", expected).hint == expected


def test_a_hint_of_a_program_that_no_make_runs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(makefile.GIVEN, raising=False)
    assert UserError("x", "make verify").hint == "make verify" and makefile.passed_on() == {}


def test_a_hint_says_what_was_given_to_make(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    scratch = tmp_path / "a  b'c$d"
    words = ["make", "serve-status", "PROFILE=flash", f"SCRATCH={scratch}"]
    said = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True).stderr.splitlines()
    command = said[1].removeprefix("hint: ")
    shown = subprocess.run(["bash", "-c", command.replace("serve", "-n serve", 1)], cwd=ROOT, capture_output=True)
    assert command.startswith("make serve PROFILE=flash SCRATCH=") and shown.returncode == 0
    again = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True).stdout
    assert f"SCRATCH={scratch}\n" in again


@pytest.mark.parametrize(
    ("systemd", "scripts", "said"),
    [
        (True, (), "sudo systemctl enable --now docker, then: sudo systemctl status docker"),
        (False, ("docker",), "sudo service docker start, then: sudo service docker status"),
        (False, (), "on the host of this container: sudo systemctl enable --now docker, then: {} status docker"),
    ],
)
def test_a_service_is_started_as_it_is_here(
    systemd: bool, scripts: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "SYSTEMD", tmp_path if systemd else tmp_path / "none")
    monkeypatch.setattr(hints, "SERVICES", tmp_path)
    for name in scripts:
        (tmp_path / name).touch()
    hint = "sudo systemctl enable --now docker, then: sudo systemctl status docker"
    told = UserError("x", hint).hint
    assert told == said.format("on the host of this container: sudo systemctl")
    assert UserError("x", told).hint == told


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ("make postprocess verify PROFILE=flash, then again", "v4forge postprocess … && v4forge verify …, then again"),
        ("make card writes it", "v4forge card … writes it"),
        ("make compare A=<folder> B=<folder>", "v4forge compare …"),
        ("make serve-stop, then: make verify", f"make serve-stop, then: v4forge verify … {hints.OF_A_CHECKOUT}"),
        ("another folder: make … SCRATCH=<folder>", f"another folder: make … SCRATCH=<folder> {hints.OF_A_CHECKOUT}"),
        ("make it a readable file", "make it a readable file"),
        ("python -m scripts.inspect_checkpoint DIR", "v4forge inspect DIR"),
    ],
)
def test_a_package_has_the_command_v4forge_and_no_makefile(
    hint: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "INSTALLED", True)
    monkeypatch.setitem(sys.modules, f"{hints.INSTALLED_SCRIPTS}.__main__", importlib.import_module("scripts.__main__"))
    told = UserError("x", hint).hint
    assert told == said == UserError("x", told).hint
