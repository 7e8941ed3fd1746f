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
from served import ROOT, Served, wait_until

from benchmarks.clients import kill, processes
from v4forge.bench.results import newest
from v4forge.bench.tools import chat_client
from v4forge.bench.tools.chat_client import Speaker, TooLong
from v4forge.bench.tools.scenarios import CATEGORIES

pytestmark = pytest.mark.serve

# Python is run by tests/docker/test_smoke_program.py.
SHORT = ("--limit", "1", "--max-tokens", "48", "--leave-out", "smoke/coding/calm-spells")


def words(served: Served, reports: Path, *more: str) -> list[str]:
    places = ["--url", served.deployment.url, "--folder", str(served.folder), "--reports", str(reports)]
    return [sys.executable, "-m", "scripts.bench", "tools", *places, *served.key_words, *SHORT, *more]


def bench(served: Served, reports: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words(served, reports, *more), cwd=ROOT, capture_output=True, text=True)


def result(reports: Path) -> dict[str, Any]:
    return newest(reports, ["tools"])["tools"].content


@pytest.fixture(scope="module", params=[1, pytest.param(3, marks=pytest.mark.soak)])
def trial(tiny: Served, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The result of so many parts of each kind, but for one part, with short answers; and what it printed."""
    reports = tmp_path_factory.mktemp("trial")
    done = bench(tiny, reports, "--limit", str(request.param))
    assert done.returncode == 0, done.stdout + done.stderr
    assert tiny.key not in json.dumps(result(reports)) + done.stdout + done.stderr
    return result(reports) | {"said": done.stdout}


def test_a_trial_is_whole_and_honest(trial: dict[str, Any]) -> None:
    assert trial["complete"] is True and not trial["failures"]
    limit = trial["trial"]
    assert f"a trial of {limit}: no result" in trial["said"]
    assert trial["target"]["artifact"]["certificate"] == "ok"
    assert trial["target"]["max_model_len"] == 8192
    parts = trial["parts"]
    assert Counter(key.partition("/")[0] for key in parts) == {
        **dict.fromkeys(CATEGORIES, limit),
        "smoke": {1: 3, 3: 7}[limit],
    }
    assert sum(part.get("score", 0) for part in parts.values()) <= 2 * limit
    assert not any(part.get("ok") for part in parts.values())


def test_the_server_takes_every_turn_that_is_sent_back(trial: dict[str, Any]) -> None:
    """Whatever a random model calls: no turn of it is refused when it comes back as part of the conversation."""
    assert max(part.get("turns", 0) for part in trial["parts"].values()) > 1


def test_a_conversation_without_room_is_told_as_that(tiny: Served) -> None:
    """In the words of this vLLM."""
    speaker = Speaker(tiny.deployment.endpoints[0], tiny.deployment.serving.model, max_tokens=48, seed=42, limit_s=60.0)
    with pytest.raises(TooLong, match="longer than the server takes") as told:
        chat_client.reply(speaker, [{"role": "user", "content": "word " * 20000}])
    assert "max-model-len=8192" in told.value.hint


@pytest.mark.soak
def test_another_model_with_a_key_is_measured_as_well(pair: Served, tmp_path: Path) -> None:
    done = bench(pair, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path)["complete"] is True
    assert pair.key not in json.dumps(result(tmp_path)) + done.stdout + done.stderr
    rows = json.loads(pair.program("status", "--json").stdout)
    assert [row["acceptance"] for row in rows] == [None, None], "it has no drafts"


@pytest.mark.soak
def test_a_server_without_room_for_the_tools_is_told_as_that(
    start: Callable[..., Served], tiny_artifact: Path, tmp_path: Path
) -> None:
    short = start(tiny_artifact, "--replicas", "1", "--drafts", "2")
    done = bench(short, tmp_path, "--leave-out", "smoke")
    assert result(tmp_path)["target"]["max_model_len"] == 2048
    assert done.returncode == 1
    assert "longer than the server takes" in done.stderr and "max-model-len=8192" in done.stderr


@pytest.mark.soak
@pytest.mark.last
@pytest.mark.parametrize("trial", [3], indirect=True)
def test_a_server_that_dies_ends_the_run_with_what_was_measured_the_same_as_before(
    tiny: Served, trial: dict[str, Any], tmp_path: Path
) -> None:
    running = subprocess.Popen(words(tiny, tmp_path), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: bool((found := newest(tmp_path, ["tools"]).get("tools")) and found.content["parts"]), 240)
    kill(pid for number in (0, 1) for pid in processes(tiny.deployment.replica_port(number)))
    _, said = running.communicate(timeout=240)
    assert running.returncode == 1 and "error: " in said and "hint: " in said
    assert "Traceback" not in said
    content = result(tmp_path)
    assert content["parts"] and not content["complete"]
    for key, part in content["parts"].items():
        for name in ("score", "why", "trace", "ok", "checks", "answer"):
            assert part.get(name) == trial["parts"][key].get(name)
    wait_until(lambda: tiny.program("status").returncode == 0, 300)
