"""The draft bench on a real vLLM: two replicas of models/tiny's artifact, two drafts a step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Served, wait_until
from dense import TINY
from programs import run_module

from benchmarks import serve_forward
from benchmarks.clients import kill, processes
from v4forge import exposition, measurement
from v4forge.acceptance import difference
from v4forge.checkpoint import Checkpoint
from v4forge.intervals import Estimate
from v4forge.target import look
from v4forge.workloads import WORKLOADS

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

PROMPTS = 4
TOKENS = 64


def words(served: Served, reports: Path, *more: str) -> list[str]:
    program = [sys.executable, "-m", "scripts.bench", "draft"]
    return [*program, "--folder", str(served.folder), "--reports", str(reports), *more]


def bench(served: Served, reports: Path, *more: str) -> str:
    done = subprocess.run(words(served, reports, *more), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result(reports: Path) -> dict[str, Any]:
    found = measurement.newest(reports, "draft")
    assert found
    return found


def counted(served: Served) -> exposition.Counts:
    return look(served.plan.url, folder=served.folder).counts()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(
    tiny: Served, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, exposition.Counts, exposition.Counts]:
    """The reports of a trial of every workload, and the counters before and after it."""
    reports = tmp_path_factory.mktemp("draft")
    before = counted(tiny)
    bench(tiny, reports, "--limit", str(PROMPTS), "--tokens", str(TOKENS))
    return reports, before, counted(tiny)


Measured = tuple[Path, exposition.Counts, exposition.Counts]


def test_a_trial_measures_every_workload(measured: Measured, tiny: Served) -> None:
    content = result(measured[0])
    assert content["complete"] and content["trial"] == PROMPTS and set(content["parts"]) == set(WORKLOADS)
    assert content["target"]["replicas"] == 2 and content["settings"]["drafts"] == 2
    assert content["target"]["artifact"]["certificate"] == "ok"
    for part in content["parts"].values():
        assert part["prompts"] == PROMPTS and len(part["counted"]) == PROMPTS and len(part["by_position"]) == 2
        assert 0 < part["acceptance"]["low"] < part["acceptance"]["value"] < part["acceptance"]["high"] < 1
    assert content["parts"]["random"]["prompt_tokens"] == 256 * PROMPTS
    assert content["parts"]["random"]["tokens"] == TOKENS * PROMPTS


def test_the_parts_add_up_to_what_the_servers_counted(measured: Measured) -> None:
    reports, before, after = measured
    parts = result(reports)["parts"].values()
    added = after.since(before)
    assert sum(part["drafts"] for part in parts) == added.drafts
    assert sum(part["draft_tokens"] for part in parts) == added.draft_tokens
    assert sum(part["accepted"] for part in parts) == added.accepted
    assert tuple(map(sum, zip(*(part["accepted_at"] for part in parts), strict=True))) == added.accepted_at
    assert sum(part["tokens"] for part in parts) == added.generated
    assert sum(part["prompt_tokens"] for part in parts) == added.prompted


def test_a_killed_bench_goes_on_in_the_middle_of_a_workload(tiny: Served, tmp_path: Path) -> None:
    options = ("--workloads", "code", "--limit", "6", "--tokens", "96")
    running = subprocess.Popen(words(tiny, tmp_path, *options), cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: any(len(lines(file)) >= 2 for file in tmp_path.glob("*.jsonl")), 120)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    (file,) = tmp_path.glob("*-code.jsonl")
    there = file.read_text().splitlines()
    assert 2 <= len(there) < 6 and result(tmp_path)["parts"] == {}
    look_again = look(tiny.plan.url, folder=tiny.folder)
    wait_until(look_again.idle, 60)
    before = counted(tiny)
    bench(tiny, tmp_path, *options)
    assert file.read_text().splitlines()[: len(there)] == there
    part = result(tmp_path)["parts"]["code"]
    added = counted(tiny).since(before)
    assert part["prompts"] == 6
    assert sum(row[0] for row in part["counted"][len(there) :]) == added.drafts


def test_the_counts_are_those_of_our_forward_on_the_same_tokens(tiny: Served, tmp_path: Path) -> None:
    """Where the server stood after each step, our forward drafts too: which of its drafts the text then confirms."""
    bench(tiny, tmp_path, "--workloads", "random", "--random-tokens", "48", "--tokens", "128", "--limit", "16")
    (file,) = tmp_path.glob("*-random.jsonl")
    rows = lines(file)
    text = torch.tensor([row["prompt_token_ids"] + row["token_ids"] for row in rows])
    artifact = Checkpoint(Path(tiny.plan.artifact), form="artifact")
    ours = serve_forward.forward(artifact, text, text[:, 48:, None], torch.device("cpu"))
    expected = serve_forward.acceptance(serve_forward.walk(ours.drafted, text, 48, 2))
    part = result(tmp_path)["parts"]["random"]
    for served, should in zip(part["given_earlier"], expected, strict=True):
        apart = difference(Estimate(**served), should)
        assert apart.low <= 0 <= apart.high, (served, should)


def test_verify_judges_the_tokens_that_are_kept(measured: Measured, tiny: Served, tmp_path: Path) -> None:
    reports, _, _ = measured
    copy = tmp_path / "artifact"
    shutil.copytree(tiny.plan.artifact, copy)
    (file,) = reports.glob("*-chat.jsonl")
    run_module("verify", "--artifact", copy, "--source", TINY, "--no-hash", "--tokens", file)
    deep = json.loads((copy / "certificate.json").read_text())["deep"]
    assert deep["sequences"] == PROMPTS
    first = Estimate(**deep["models"]["artifact"]["drafts"][0]["acceptance_after_accepted"])
    part = result(reports)["parts"]["chat"]
    apart = difference(Estimate(**part["given_earlier"][0]), first)
    assert apart.low <= 0 <= apart.high, (part["given_earlier"][0], first)


def test_offline_figures_are_set_beside_the_servers(tiny: Served, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(tiny.plan.artifact, copy)
    run_module("verify", "--artifact", copy, "--source", TINY, "--no-hash", "--deep", "2048", "--seq-len", "256")
    certificate = copy / "certificate.json"
    options = ("--offline", str(certificate), "--workloads", "prose", "--limit", "3", "--tokens", "48")
    said = bench(tiny, tmp_path / "reports", *options)
    told = result(tmp_path / "reports")["parts"]["prose"]["offline"]
    deep = json.loads(certificate.read_text())["deep"]
    assert told["source"] == str(certificate) and told["tokens"] == deep["tokens"]
    assert told["acceptance"] == deep["models"]["artifact"]["drafts"][1]["acceptance_rate"]
    assert told["difference"]["acceptance"]["low"] < told["difference"]["acceptance"]["high"]
    assert "they may differ:" in said and "published" not in said


def test_a_thinking_chat_and_drawn_tokens_are_measured_too(tiny: Served, tmp_path: Path) -> None:
    options = ("--workloads", "chat", "--limit", "2", "--tokens", "32", "--temperature", "0.8", "--thinking")
    bench(tiny, tmp_path, *options)
    content = result(tmp_path)
    assert content["sampling"] == {"tokens": 32, "temperature": 0.8, "seed": 42, "thinking": True}
    assert 0 < content["parts"]["chat"]["acceptance"]["value"] < 1


def test_a_replica_that_dies_ends_the_workload_and_what_was_measured_is_kept(tiny: Served, tmp_path: Path) -> None:
    options = ("--workloads", "prose", "--limit", "8", "--tokens", "128")
    running = subprocess.Popen(
        words(tiny, tmp_path, *options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    wait_until(lambda: any(len(lines(file)) >= 2 for file in tmp_path.glob("*.jsonl")), 120)
    kill(processes(tiny.plan.replica_port(1)))
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 1
    failure = result(tmp_path)["failures"]["prose"]
    assert failure["fact"].startswith("prompt prose/") and "of 8 prompts are kept" in failure["hint"]
    assert failure["fact"] in said
    wait_until(lambda: tiny.program("status").returncode == 0, 300)
    bench(tiny, tmp_path, *options)
    assert result(tmp_path)["parts"]["prose"]["prompts"] == 8
