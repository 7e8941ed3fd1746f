"""docker/serve/v4forge-serve@.service: a unit that systemd takes, as docs/serving.md installs it, of real commands."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from v4forge.serving.deployment import Deployment
from v4forge.serving.launch import Start

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = Path("docker/serve/v4forge-serve@.service")
DOC = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
# In the place of sudo: writes tee's input into a folder of the test, and notes the other commands.
SUDO = """#!/bin/sh
case $1 in tee) cat >"$INSTALLED/${2##*/}";; *) echo "$@" >>"$INSTALLED/commands";; esac
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the document's commands write, run in a checkout whose path has a blank."""
    folder = tmp_path_factory.mktemp("unit")
    checkout = folder / "a checkout"
    (checkout / TEMPLATE).parent.mkdir(parents=True)
    shutil.copy(ROOT / TEMPLATE, checkout / TEMPLATE)
    (folder / "sudo").write_text(SUDO)
    (folder / "sudo").chmod(0o755)
    (block,) = [text for text in re.findall(r"(?:^ {4}.*\n)+", DOC, flags=re.MULTILINE) if f"{TEMPLATE}" in text]
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "INSTALLED": str(folder)}
    subprocess.run(["sh", "-ec", block], cwd=checkout, env=environment, check=True, capture_output=True)
    return folder


def unit(installed: Path) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(installed / TEMPLATE.name)
    return {name: dict(parser[name]) for name in parser.sections()}


def seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)(h|min)", text)
    assert found
    return int(found[1]) * {"h": 3600, "min": 60}[found[2]]


def test_the_documents_commands_put_this_checkout_and_this_user_in_and_enable_a_profile(installed: Path) -> None:
    service = unit(installed)["Service"]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert (service["User"], service["WorkingDirectory"]) == (user, str(installed / "a checkout"))
    commands = (installed / "commands").read_text().splitlines()
    assert commands == ["systemctl daemon-reload", "systemctl enable --now v4forge-serve@flash"]


def test_it_starts_and_stops_by_the_targets_of_the_makefile(installed: Path) -> None:
    service, makefile = unit(installed)["Service"], (ROOT / "Makefile").read_text(encoding="utf-8")
    for key, target in (("ExecStart", "serve"), ("ExecStop", "serve-stop")):
        assert service[key] == f"/usr/bin/make {target} PROFILE=%i $OPTIONS"
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_it_waits_as_long_as_they_may_take(installed: Path) -> None:
    service = unit(installed)["Service"]
    assert seconds(service["TimeoutStartSec"]) > 2 * Start.timeout_s  # the artifact is read before
    assert seconds(service["TimeoutStopSec"]) > Deployment.drain_s + 60 + 60


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_takes_the_unit_and_knows_every_key(installed: Path) -> None:
    def verify(name: str) -> str:
        words = ["systemd-analyze", "verify", str(installed / name)]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"SYSTEMD_LOG_TARGET": "console"})
        return done.stdout + done.stderr

    assert verify(TEMPLATE.name) == ""
    text = (installed / TEMPLATE.name).read_text()
    (installed / "other@.service").write_text(text.replace("ExecStop=", "ExecStopp="))
    assert "ExecStopp" in verify("other@.service")
