"""The tool-calling bench against a real vLLM: the small models win nothing, and the run is whole and says so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Served, wait_until

from benchmarks.clients import kill, processes
from v4forge.measurement import newest
from v4forge.scenarios import CATEGORIES

pytestmark = pytest.mark.serve

# Python is run by tests/images/test_smoke_program.py.
SHORT = ("--limit", "1", "--max-tokens", "48", "--leave-out", "smoke/coding/calm-spells")
# The twelve tools are 2,600 tokens of models/tiny's tokenizer.
ROOM = "max-model-len=8192"


@pytest.fixture(scope="module")
def roomy(start: Callable[..., Served], tiny_artifact: Path) -> Served:
    """One replica of the artifact with room for the tools."""
    return start(tiny_artifact, "--replicas", "1", "--drafts", "2", "--set", ROOM)


def words(served: Served, reports: Path, *more: str) -> list[str]:
    places = ["--url", served.plan.url, "--folder", str(served.folder), "--reports", str(reports)]
    return [sys.executable, "-m", "scripts.bench", "tools", *places, *SHORT, *more]


def bench(served: Served, reports: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(served, reports, *more), cwd=ROOT, capture_output=True, text=True)


def result(reports: Path) -> dict[str, Any]:
    found = newest(reports, "tools")
    assert found is not None
    return found


def test_a_trial_is_whole_and_honest_and_the_same_again(roomy: Served, tmp_path: Path) -> None:
    runs = []
    for name in ("first", "second"):
        done = bench(roomy, tmp_path / name)
        assert done.returncode == 0, done.stdout + done.stderr
        content = result(tmp_path / name)
        assert content["complete"] is True and content["trial"] == 1 and not content["failures"]
        assert content["target"]["artifact"]["certificate"] == "ok"
        assert content["target"]["max_model_len"] == 8192
        runs.append(content["parts"])
    assert Counter(key.partition("/")[0] for key in runs[0]) == {**dict.fromkeys(CATEGORIES, 1), "smoke": 3}
    assert sum(part.get("score", 0) for part in runs[0].values()) <= 2
    assert not any(part.get("ok") for part in runs[0].values())
    for key, part in runs[0].items():
        told = ("score", "why", "trace") if "score" in part else ("ok", "checks", "answer")
        assert {name: part[name] for name in told} == {name: runs[1][key][name] for name in told}
    assert "a trial of 1: no result" in done.stdout and "10 (all: 30)" in done.stdout


def test_the_server_takes_every_turn_that_is_sent_back(roomy: Served, tmp_path: Path) -> None:
    """Whatever a random model calls: no turn of it is refused when it comes back as part of the conversation."""
    done = bench(roomy, tmp_path, "--limit", "3", "--leave-out", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    parts = result(tmp_path)["parts"]
    assert len(parts) == 15 and max(part["turns"] for part in parts.values()) > 1


def test_another_model_with_a_key_is_measured_as_well(pair: Served, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(pair.key + "\n")
    done = bench(pair, tmp_path, "--api-key-file", str(key))
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path)["complete"] is True
    assert pair.key not in json.dumps(result(tmp_path)) + done.stdout + done.stderr


def test_a_server_without_room_for_the_tools_is_told_as_that(tiny: Served, tmp_path: Path) -> None:
    done = bench(tiny, tmp_path, "--leave-out", "smoke")
    length = result(tmp_path)["target"]["max_model_len"]
    if length > 2048:
        pytest.skip(f"the fixture has room for {length} tokens")
    assert done.returncode == 1
    assert "longer than the server takes" in done.stderr and "max-model-len=8192" in done.stderr


def test_a_server_that_dies_ends_the_run_and_the_next_one_goes_on(roomy: Served, tmp_path: Path) -> None:
    running = subprocess.Popen(words(roomy, tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: bool((found := newest(tmp_path, "tools")) and found["parts"]), 240)
    kill(processes(roomy.plan.replica_port(0)))
    _, said = running.communicate(timeout=240)
    assert running.returncode == 1 and "error: " in said and "hint: " in said
    assert "Traceback" not in said
    kept = list(result(tmp_path)["parts"])
    assert kept and not result(tmp_path)["complete"]
    wait_until(lambda: roomy.program("status").returncode == 0, 240)  # supervisord starts it again
    done = bench(roomy, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    content = result(tmp_path)
    assert content["complete"] is True and set(kept) < set(content["parts"])
    assert len(content["commands"]) == 2
