"""The workflow runs the project's own commands, with no more rights than it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
STEPS: list[dict[str, Any]] = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
COMMANDS = [step["run"] for step in STEPS if "run" in step]
DOC = (ROOT / "docs/ci.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["\n".join(COMMANDS), DOC], ids=["the workflow", "docs/ci.md"])
def test_every_make_target_exists(text: str) -> None:
    targets = set(re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    commands = re.findall(r"""(?:^ *|[`"']|[|!] )make ((?:[a-z-]+ ?)+)""", text, flags=re.MULTILINE)
    called = {target for command in commands for target in command.split()}
    assert called - targets == set()
    assert {"pull", "images"} <= called


def test_it_pulls_before_it_builds_and_then_runs_what_ci_is() -> None:
    images = [step.get("run", "") for step in WORKFLOW["jobs"]["images"]["steps"]]
    (pull,) = (number for number, command in enumerate(images) if "make pull" in command)
    assert images[pull].index("make pull") < images[pull].index("make images")
    assert ".ci/run" in images[pull + 1 :]


def test_its_token_reads_and_is_not_left_in_the_checkout() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in WORKFLOW["jobs"].values())
    checkouts = [step for step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(WORKFLOW["jobs"])
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_no_command_is_made_from_what_a_pull_request_says() -> None:
    assert not [command for command in COMMANDS if "${{" in command]
    assert not any("secrets." in str(step) for step in STEPS)
