"""`bench quality` as its program, with the real lm-eval: on a real server, and on one that fails in every way."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai_stand_in as stand_in
import pytest
import quality_data
from served import ROOT, SERVE_ENVIRONMENT, Served, wait_until
from staged import build

from v4forge.bench import quality
from v4forge.bench.statistics import proportion
from v4forge.images import base, containers, definitions
from v4forge.serving import client

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(900)]
TRIAL = ("--limit", "2", "--max-tokens", "16")
GSM8K = ("--tasks", "gsm8k")
TWENTY_SEVEN = " There are 27 of them.\n#### 27"
fruit = stand_in.saying(TWENTY_SEVEN)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quality_data.write(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def python_image() -> str:
    """An image with python3 in which programs may run."""
    engine = containers.connect()
    with tempfile.TemporaryDirectory() as folder:
        return build(engine, base.debian(engine.client), Path(folder), lane="cpu", code=definitions.code_sha256())


def command(reports: Path, *arguments: object) -> list[str]:
    places = ["--reports", str(reports), "--backend", "cpu", "--runtime", "host", "--program"]
    program = str(SERVE_ENVIRONMENT / "bin")
    return [sys.executable, "-m", "scripts.bench", "quality", *places, program, *map(str, arguments)]


def bench(reports: Path, *arguments: object, key: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "API_KEY": key}
    return subprocess.run(command(reports, *arguments), cwd=ROOT, capture_output=True, text=True, env=environment)


def results(reports: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(reports.glob("quality-*.json"))]


def result(reports: Path) -> dict[str, Any]:
    (found,) = results(reports)
    return found


@pytest.fixture(scope="module")
def measured(tiny: Served, data: Path, python_image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of a trial of every task on the tiny artifact."""
    reports = tmp_path_factory.mktemp("reports")
    tasks = ["--tasks", *quality.table().tasks, "--sandbox-image", python_image]
    done = bench(reports, "--folder", tiny.folder, "--datasets", data, *TRIAL, *tasks)
    assert done.returncode == 0, done.stdout + done.stderr
    return reports


def test_every_task_is_measured_on_a_real_server_and_marked_as_a_trial(measured: Path) -> None:
    found = result(measured)
    assert found["complete"] and found["trial"] == 2
    assert set(found["parts"]) == set(quality.table().tasks)
    for name, part in found["parts"].items():
        assert part["differs"][0].startswith("a trial of"), name
        for metric in part["metrics"].values():
            assert 0 <= metric["value"] <= 1
            assert metric["se"] is not None
    assert found["target"]["artifact"]["certificate"] == "ok"
    assert found["versions"]["lm_eval"] == found["parts"]["gsm8k"]["lm_eval"]


def test_the_parts_of_a_group_are_those_with_local_data(measured: Path) -> None:
    parts = result(measured)["parts"]
    assert set(parts["mmlu"]["parts"]) == {f"mmlu_{subject}" for subject in quality_data.SUBJECTS}
    assert set(parts["mmlu_pro"]["parts"]) == {"mmlu_pro_computer_science", "mmlu_pro_history"}
    assert parts["mmlu"]["questions"] == 2 * len(quality_data.SUBJECTS)
    assert "54 of 57 parts are missing" in parts["mmlu"]["differs"]


def test_the_log_probabilities_of_choices_are_those_of_the_next_token(tiny: Served, measured: Path) -> None:
    path = measured / result(measured)["parts"]["mmlu"]["samples"]
    with gzip.open(path, "rt") as lines:
        sample = json.loads(next(iter(lines)))
    arguments = sample["arguments"]["gen_args_0"]
    request = {"prompt": arguments["arg_0"], "max_tokens": 1, "temperature": 0, "logprobs": 20}
    request["model"] = tiny.deployment.serving.model
    answer = client.ask(tiny.deployment.endpoints[0], "/v1/completions", request)
    told = answer["choices"][0]["logprobs"]["top_logprobs"][0]
    assert float(quality.first(sample["resps"])) == pytest.approx(told[arguments["arg_1"]], abs=0.1)


def test_programs_of_the_model_are_judged_and_kept_with_their_verdict(measured: Path) -> None:
    part = result(measured)["parts"]["humaneval_instruct"]
    assert sum(part["outcomes"].values()) == part["questions"] == 2
    with gzip.open(measured / part["samples"], "rt") as lines:
        samples = [json.loads(line) for line in lines]
    assert all(sample["program"].startswith("def add_") and sample["outcome"] for sample in samples)


def right_or_not(handler: stand_in.Handler, body: stand_in.Body) -> None:
    """The one of four functions that adds 2, the one of six sums that is 27."""
    text = "    return x + 2\n```\nThis is right for one of the four." if "def add_" in body["prompt"] else TWENTY_SEVEN
    stand_in.saying(text)(handler, body)


def test_right_answers_and_programs_count_and_the_key_reaches_the_server_alone(
    data: Path, python_image: str, tmp_path: Path
) -> None:
    options = ("--tasks", "gsm8k", "humaneval_instruct", "--sandbox-image", python_image, "--limit", 6)
    with stand_in.serving(right_or_not) as server:
        done = bench(tmp_path, "--url", server.url, "--datasets", data, *options, key="sesame-oil")
    assert done.returncode == 0, done.stdout + done.stderr
    sums, programs = (result(tmp_path)["parts"][name] for name in ("gsm8k", "humaneval_instruct"))
    assert sums["metrics"]["strict"] == {"value": pytest.approx(1 / 6), "se": pytest.approx(proportion(1, 6)["se"])}
    assert programs["outcomes"] == {"failed": 3, "passed": 1}
    assert programs["metrics"]["pass@1"] == {"value": 0.25, "se": 0.25}
    assert {body["temperature"] for body in server.asked} == {0}
    assert [body["prompt"].count("Question:") for body in server.asked if "def add_" not in body["prompt"]] == [9] * 6
    assert server.keys == {"Bearer sesame-oil"}
    assert "sesame" not in done.stdout + done.stderr
    assert not any(b"sesame" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_without_an_image_no_program_is_asked_for(data: Path, tmp_path: Path) -> None:
    with stand_in.serving(fruit) as server:
        tasks = ("--tasks", "humaneval_instruct", "--sandbox-image", "no-such-image")
        done = bench(tmp_path, "--url", server.url, "--datasets", data, *TRIAL, *tasks)
    assert done.returncode == 1 and not server.asked
    assert "run in containers only" in result(tmp_path)["failures"]["humaneval_instruct"]["fact"]


FAULTS = {
    "500": (stand_in.broken, "the server answered HTTP 500"),
    "garbage": (stand_in.garbage, "the server answered something else than JSON"),
    "stall": (stand_in.late(60, fruit), "an answer did not come in time"),
}


@pytest.mark.parametrize("names", [("500", "stall"), pytest.param(("garbage",), marks=pytest.mark.soak)], ids=" ".join)
def test_a_server_that_fails_is_told_in_time(data: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    def run(name: str) -> tuple[subprocess.CompletedProcess[str], int]:
        with stand_in.serving(FAULTS[name][0]) as server:
            options = ("--datasets", data, *GSM8K, *TRIAL, "--request-timeout", 2)
            return bench(tmp_path / name, "--url", server.url, *options), len(server.asked)

    with ThreadPoolExecutor() as pool:  # mostly they wait before they ask again
        runs = dict(zip(names, pool.map(run, names), strict=True))
    for name, (done, asked) in runs.items():
        assert done.returncode == 1, name
        failure = result(tmp_path / name)["failures"]["gsm8k"]
        assert FAULTS[name][1] in failure["fact"] and "make serve-logs" in failure["hint"]
        assert "Traceback" not in done.stdout + done.stderr
        assert asked <= 2 * quality.table().attempts


@pytest.mark.soak  # a bench that is killed, below, goes on in the same way
def test_a_server_that_dies_leaves_the_answers_that_came_and_the_same_again_completes_them(
    data: Path, tmp_path: Path
) -> None:
    options = ("--datasets", data, *TRIAL, "--tasks", "mmlu_pro", "--request-timeout", 5)
    with stand_in.serving(stand_in.dying(2, fruit)) as server:
        port = server.server_port
        done = bench(tmp_path, "--url", server.url, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert result(tmp_path)["failures"]["mmlu_pro"]["fact"].startswith("the server")
    with stand_in.serving(fruit, port) as server:
        done = bench(tmp_path, "--url", server.url, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    second = result(tmp_path)
    assert second["complete"]
    assert second["parts"]["mmlu_pro"]["answers_of_earlier_runs"] >= 1
    assert len(second["commands"]) == 2


def test_a_killed_bench_takes_lm_eval_along_and_asks_no_answered_question_again(data: Path, tmp_path: Path) -> None:
    options = ("--datasets", data, *GSM8K, "--limit", 6, "--max-tokens", 16, "--concurrency", 2)
    with stand_in.serving(stand_in.late(1, fruit)) as server:
        with subprocess.Popen(command(tmp_path, "--url", server.url, *options), cwd=ROOT) as runner:
            wait_until(lambda: len(server.asked) >= 4 or runner.poll() is not None, 300)
            assert lm_evals(tmp_path)
            runner.kill()
        wait_until(lambda: not lm_evals(tmp_path), 20)
        asked = len(server.asked)
        assert not result(tmp_path)["parts"]
        done = bench(tmp_path, "--url", server.url, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    part = result(tmp_path)["parts"]["gsm8k"]
    assert part["questions"] == 6
    assert part["answers_of_earlier_runs"] >= 2
    assert len(server.asked) - asked == 6 - part["answers_of_earlier_runs"]


def lm_evals(reports: Path) -> list[str]:
    listed = subprocess.run(["ps", "-wweo", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "lm_eval_start.py run" in line and str(reports) in line]


def test_a_dry_run_says_what_would_be_asked_and_asks_nobody(tmp_path: Path) -> None:
    done = bench(tmp_path / "reports", "--dry-run", "--limit", 10)
    assert done.returncode == 0, done.stderr
    assert "quality: 740 questions in 5 tasks" in done.stdout
    assert not (tmp_path / "reports").exists()


def test_local_copies_that_are_damaged_are_told_without_a_traceback(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/gsm8k/test.jsonl").write_text('{"question": "How')
    with stand_in.serving(fruit) as server:
        done = bench(tmp_path / "reports", "--url", server.url, "--datasets", tmp_path / "data", *GSM8K, *TRIAL)
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "the data files cannot be read" in said and "hint: " in said and "Traceback" not in said
