"""CI has every kind of test, and the workflows run the project's own commands, with no more rights than they need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dev import ci

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^\.PHONY: (\S+)$", MAKEFILE, flags=re.MULTILINE))
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github/workflows").iterdir()
}
JOBS: list[dict[str, Any]] = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
STEPS: list[dict[str, Any]] = [step for job in JOBS for step in job["steps"]]
COMMANDS = [step["run"] for step in STEPS if "run" in step]
DOC = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
CI_RUN = (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_ci_runs_every_kind_of_check_and_of_test() -> None:
    assert set(ci.parts()) == {
        "lint",
        "lock-check",
        "docs",
        "docs-check",
        "env-serve-cpu",
        *(name for name in TARGETS if name.startswith("test")),
    }
    assert set(ci.parts()) < TARGETS


def test_every_part_has_a_budget_and_so_has_what_ci_run_does_before() -> None:
    before = re.findall(r"^timed (\w+)$", CI_RUN, flags=re.MULTILINE)
    assert len(before) == 3
    assert ci.budgets(ROOT).keys() == {*ci.parts(), *before, "whole"}
    assert f'{ci.BEFORE}="' in CI_RUN


def test_what_ci_leaves_out_runs_every_night() -> None:
    nightly = WORKFLOWS["nightly"]
    assert "schedule" in nightly[True]  # YAML 1.1 reads `on` as a truth
    assert ".ci/run soak" in [step.get("run") for job in nightly["jobs"].values() for step in job["steps"]]
    assert "pytest -m $(call q,soaked)" in MAKEFILE
    assert all("not soak" in chosen for chosen in re.findall(r'-m "(.*)"', MAKEFILE))


@pytest.mark.parametrize("text", ["\n".join(COMMANDS), DOC], ids=["the workflow", "docs/ci.md"])
def test_every_make_target_exists(text: str) -> None:
    commands = re.findall(r"""(?:^ *|[`"']|[|!] )make ((?:[a-z-]+ ?)+)""", text, flags=re.MULTILINE)
    called = {target for command in commands for target in command.split()}
    assert called - TARGETS == set()
    assert {"pull", "images"} <= called


def test_it_pulls_before_it_builds_and_then_runs_what_ci_is() -> None:
    images = [step.get("run", "") for step in WORKFLOWS["ci"]["jobs"]["images"]["steps"]]
    (pull,) = (number for number, command in enumerate(images) if "make pull" in command)
    assert images[pull].index("make pull") < images[pull].index("make images")
    assert ".ci/run" in images[pull + 1 :]


def test_its_token_reads_and_is_not_left_in_the_checkout() -> None:
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    assert not any("permissions" in job for job in JOBS)
    checkouts = [step for step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(JOBS)
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_no_command_is_made_from_what_a_pull_request_says() -> None:
    assert not [command for command in COMMANDS if "${{" in command]
    assert not any("secrets." in str(step) for step in STEPS)
