"""The draft bench on a real vLLM: two replicas of models/tiny's artifact, two drafts a step."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import TINY
from programs import run_module
from served import ROOT, Served, wait_until

from benchmarks import serve_forward
from benchmarks.clients import kill, processes
from v4forge.bench import results
from v4forge.bench.served_model import look
from v4forge.bench.statistics import difference
from v4forge.bench.workloads import PROMPT_TOKENS, WORKLOADS
from v4forge.checkpoint.reader import Checkpoint
from v4forge.intervals import Estimate
from v4forge.serving.metrics import Counts

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

PROMPTS = 6
TOKENS = 64
COUNT = 6  # prompts of a bench that is interrupted after the second


def words(served: Served, reports: Path, *more: str) -> list[str]:
    program = [sys.executable, "-m", "scripts.bench", "draft"]
    return [*program, "--folder", str(served.folder), "--reports", str(reports), *more]


def bench(served: Served, reports: Path, *more: str) -> str:
    done = subprocess.run(words(served, reports, *more), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result(reports: Path) -> dict[str, Any]:
    return results.newest(reports, ["draft"])["draft"].content


def counted(served: Served) -> Counts:
    return look(served.deployment.url, served.key, served.folder).counts()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@dataclass(frozen=True)
class Measured:
    """A trial of every workload: its reports, what it said, the servers' counters before and after it, and the
    artifact's certificate with figures of verify --deep."""

    reports: Path
    said: str
    before: Counts
    after: Counts
    certificate: Path


@pytest.fixture(scope="module")
def measured(tiny: Served, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("draft")
    copy, reports = folder / "artifact", folder / "reports"
    shutil.copytree(tiny.deployment.artifact, copy)
    run_module("verify", "--artifact", copy, "--source", TINY, "--no-hash", "--deep", "1024", "--seq-len", "256")
    certificate = copy / "certificate.json"
    before = counted(tiny)
    said = bench(tiny, reports, "--limit", str(PROMPTS), "--tokens", str(TOKENS), "--offline", str(certificate))
    return Measured(reports, said, before, counted(tiny), certificate)


def test_a_trial_measures_every_workload(measured: Measured) -> None:
    content = result(measured.reports)
    assert content["complete"] and content["trial"] == PROMPTS and set(content["parts"]) == set(WORKLOADS)
    assert content["target"]["replicas"] == 2 and content["settings"]["drafts"] == 2
    assert content["target"]["artifact"]["certificate"] == "ok"
    for part in content["parts"].values():
        assert part["prompts"] == PROMPTS and len(part["counted"]) == PROMPTS and len(part["by_position"]) == 2
        assert 0 < part["acceptance"]["low"] < part["acceptance"]["value"] < part["acceptance"]["high"] < 1
    assert content["parts"]["random"]["prompt_tokens"] == 256 * PROMPTS
    assert content["parts"]["random"]["tokens"] == TOKENS * PROMPTS


def test_the_parts_add_up_to_what_the_servers_counted(measured: Measured) -> None:
    parts = result(measured.reports)["parts"].values()
    added = measured.after.since(measured.before)
    assert sum(part["drafts"] for part in parts) == added.drafts
    assert sum(part["draft_tokens"] for part in parts) == added.draft_tokens
    assert sum(part["accepted"] for part in parts) == added.accepted
    assert tuple(map(sum, zip(*(part["accepted_at"] for part in parts), strict=True))) == added.accepted_at
    assert sum(part["tokens"] for part in parts) == added.generated
    assert sum(part["prompt_tokens"] for part in parts) == added.prompted


def test_offline_figures_are_set_beside_the_servers(measured: Measured) -> None:
    deep = json.loads(measured.certificate.read_text())["deep"]
    for part in result(measured.reports)["parts"].values():
        told = part["offline"]
        assert told["source"] == str(measured.certificate) and told["tokens"] == deep["tokens"]
        assert told["acceptance"] == deep["models"]["artifact"]["drafts"][1]["acceptance_rate"]
        assert told["difference"]["acceptance"]["low"] < told["difference"]["acceptance"]["high"]
    assert "they may differ:" in measured.said and "published" not in measured.said


def test_the_counts_are_those_of_our_forward_on_the_same_tokens(measured: Measured, tiny: Served) -> None:
    """Where the server stood after each step, our forward drafts too: which of its drafts the text then confirms."""
    (file,) = measured.reports.glob("*-random.jsonl")
    text = torch.tensor([row["prompt_token_ids"] + row["token_ids"] for row in lines(file)])
    artifact = Checkpoint(Path(tiny.deployment.artifact), form="artifact")
    ours = serve_forward.forward(artifact, text, text[:, PROMPT_TOKENS:, None], torch.device("cpu"))
    expected = serve_forward.acceptance(serve_forward.walk(ours.drafted, text, PROMPT_TOKENS, 2))
    part = result(measured.reports)["parts"]["random"]
    for served, should in zip(part["given_earlier"], expected, strict=True):
        apart = difference(Estimate(**served), should)
        assert apart.low <= 0 <= apart.high, (served, should)


def test_verify_judges_the_tokens_that_are_kept(measured: Measured, tiny: Served, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(tiny.deployment.artifact, copy)
    (file,) = measured.reports.glob("*-chat.jsonl")
    run_module("verify", "--artifact", copy, "--source", TINY, "--no-hash", "--tokens", file)
    deep = json.loads((copy / "certificate.json").read_text())["deep"]
    assert deep["sequences"] == PROMPTS
    first = Estimate(**deep["models"]["artifact"]["drafts"][0]["acceptance_after_accepted"])
    part = result(measured.reports)["parts"]["chat"]
    apart = difference(Estimate(**part["given_earlier"][0]), first)
    assert apart.low <= 0 <= apart.high, (part["given_earlier"][0], first)


@dataclass(frozen=True)
class Chats:
    """The workload of chats that think, with tokens that are drawn, in a folder of its own."""

    served: Served
    reports: Path
    options = (
        "--workloads",
        "chat",
        "--limit",
        str(COUNT),
        "--tokens",
        str(TOKENS),
        "--temperature",
        "0.8",
        "--thinking",
    )

    def start(self) -> subprocess.Popen[str]:
        command = words(self.served, self.reports, *self.options)
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def kept(self) -> list[str]:
        return [line for file in self.reports.glob("*-chat.jsonl") for line in file.read_text().splitlines()]

    def finish(self, kept: list[str], commands: int) -> None:
        """The same command again: it keeps what is there, and is whole after so many."""
        bench(self.served, self.reports, *self.options)
        content = result(self.reports)
        assert content["complete"] and len(content["commands"]) == commands and self.kept()[: len(kept)] == kept
        assert content["sampling"] == {"tokens": TOKENS, "temperature": 0.8, "seed": 42, "thinking": True}
        assert content["parts"]["chat"]["prompts"] == COUNT and 0 < content["parts"]["chat"]["acceptance"]["value"] < 1


def test_a_bench_that_is_killed_goes_on_in_the_middle_of_a_workload(tiny: Served, tmp_path: Path) -> None:
    chats = Chats(tiny, tmp_path)
    running = chats.start()
    wait_until(lambda: len(chats.kept()) >= 2, 120)
    running.kill()
    running.communicate()
    first = chats.kept()
    assert 2 <= len(first) < COUNT and result(tmp_path)["parts"] == {}
    wait_until(look(tiny.deployment.url, tiny.key, tiny.folder).idle, 60)
    chats.finish(first, commands=2)


@pytest.mark.soak
@pytest.mark.last
def test_a_bench_whose_replica_dies_goes_on_in_the_middle_of_a_workload(tiny: Served, tmp_path: Path) -> None:
    chats = Chats(tiny, tmp_path)
    running = chats.start()
    wait_until(lambda: len(chats.kept()) >= 2, 120)
    kill(processes(tiny.deployment.replica_port(1)))
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 1
    failure, first = result(tmp_path)["failures"]["chat"], chats.kept()
    assert failure["fact"].startswith("prompt chat/") and failure["fact"] in said
    assert f"{len(first)} of {COUNT} prompts are kept" in failure["hint"]
    assert 2 <= len(first) < COUNT
    wait_until(lambda: tiny.program("status").returncode == 0, 300)
    chats.finish(first, commands=2)
