"""models/tiny's artifact served with drafts, and artifacts that must not be: what the guards find before and after."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from ports import free_ports
from safetensors import safe_open
from safetensors.torch import save_file
from served import Served, serve, share_caches

from benchmarks.clients import message
from v4forge.serving import client, metrics

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]


def copy_of(artifact: Path, folder: Path) -> Path:
    shutil.copytree(artifact, folder / "artifact")
    return folder / "artifact"


def without_start(artifact: Path, folder: Path, *arguments: str) -> list[str]:
    """The lines of the error that a start ends in."""
    places = ["--artifact", str(artifact), "--folder", str(folder / "serve"), "--port", str(free_ports(8))]
    done = serve("up", *places, "--backend", "cpu", "--replicas", "1", *arguments)
    if done.returncode == 0:
        serve("stop", "--folder", str(folder / "serve"))
    assert done.returncode == 1, done.stdout
    assert not (folder / "serve" / "serving.json").exists()
    return done.stderr.splitlines()[-2:]


def change(artifact: Path, name: str, to: torch.Tensor | None) -> None:
    """Replaces a tensor of an artifact, or leaves it out."""
    index = artifact / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = artifact / listed["weight_map"][name]
    with safe_open(shard, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    if to is None:
        del tensors[name], listed["weight_map"][name]
        index.write_text(json.dumps(listed))
    else:
        tensors[name] = to.to(tensors[name].dtype).reshape(tensors[name].shape)
    save_file(tensors, shard)


def test_every_check_of_the_probe_passes_on_both_replicas(tiny: Served) -> None:
    rows = [line for line in tiny.said.splitlines() if line.startswith("replica")]
    assert len(rows) == 15, tiny.said
    assert [row for row in rows if " ok " not in row] == []
    assert any("the MTP block: 31 parameters from 55 tensors" in row for row in rows)


def test_the_status_shows_the_drafts_that_are_accepted(tiny: Served) -> None:
    assert all(outcome.whole for outcome in tiny.ask_all([message(f"def f{n}(x):", tokens=32) for n in range(8)]))
    rows = json.loads(tiny.program("status", "--json").stdout)
    assert [row["state"] for row in rows] == ["ready", "ready"]
    assert all(0.2 < row["acceptance"] < 0.95 for row in rows)


def test_drafts_are_made_only_while_few_requests_run(tiny: Served) -> None:
    def made(requests: int) -> float:
        """Drafts a token of the answers."""
        before = [client.metrics(at).counts for at in tiny.deployment.endpoints]
        assert all(outcome.whole for outcome in tiny.ask_all([message(f"x{n}", tokens=64) for n in range(requests)]))
        after = [client.metrics(at).counts for at in tiny.deployment.endpoints]
        added = metrics.total(now.since(then) for now, then in zip(after, before, strict=True))
        return (added.drafts or 0) / (added.generated or 0)

    assert made(4) > 0.3
    assert made(48) < 0.1


def test_a_prompt_of_two_tokens_may_come_beside_a_context_that_the_indexer_chooses_from(tiny: Served) -> None:
    """Four tokens are one key; of fewer there is none yet."""
    url = f"http://127.0.0.1:{tiny.deployment.replica_port(0)}/v1/completions"
    headers = {"Authorization": f"Bearer {tiny.key}"}

    def status(tokens: int) -> int:
        asked = {"prompt": [17] * tokens, "max_tokens": 4, "ignore_eos": True}
        return httpx.post(url, json=asked, headers=headers, timeout=60).status_code

    asked = {"prompt": [17, 18] * 1200, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=asked, headers=headers, timeout=60) as answer:
        events = (line for line in answer.iter_lines() if line.startswith("data: "))
        next(events)
        assert status(2) == 200
        with ThreadPoolExecutor(6) as clients:
            for _ in range(3):
                assert list(clients.map(status, [90, 3, 90, 2, 90, 1])) == [200] * 6
        rest = list(events)
    assert len(rest) > 20 and rest[-1] == "data: [DONE]"  # it was there all the time


def test_both_replicas_answer_a_greedy_question_alike(tiny: Served) -> None:
    # Of no token of this answer another is nearly as likely, which in another batch would be the greater.
    outcomes = tiny.ask_all([message("import numpy as np\n", tokens=24) for _ in range(12)])
    assert {outcome.replica for outcome in outcomes} == {"0", "1"}
    assert len({outcome.text for outcome in outcomes}) == 1


def test_an_artifact_without_a_passing_certificate_of_its_own_is_not_served(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    artifact = copy_of(tiny_artifact, tmp_path)
    certificate = artifact / "certificate.json"
    passing = json.loads(certificate.read_text())
    for text, fact in (
        (None, "has no certificate.json: verify has not seen it"),
        (json.dumps(passing | {"ok": False}), "says that it failed"),
        (json.dumps(passing | {"checks": [{"name": "aliases", "ok": False}]}), "says that it failed: aliases"),
        ("[", "says that it failed: unreadable"),
        (json.dumps(passing | {"sums_sha256": "0" * 64}), "is of another artifact than the one beside it"),
    ):
        certificate.unlink() if text is None else certificate.write_text(text)
        error, hint = without_start(artifact, tmp_path)
        assert fact in error
        assert hint.startswith("hint: python -m scripts.verify --artifact ") and "ALLOW=certificate" in hint
    error, _ = without_start(tmp_path / "nothing", tmp_path)
    assert error.startswith("error: there is no artifact in ")


def test_without_a_gpu_the_default_backend_is_refused_with_what_to_do(tiny_artifact: Path, tmp_path: Path) -> None:
    done = serve("up", "--artifact", str(tiny_artifact), "--folder", str(tmp_path / "serve"))
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].startswith("error: there is no libnvidia-ml.so.1")
    assert "BACKEND=cpu" in done.stderr.splitlines()[1]


@pytest.fixture
def of_another(tiny_artifact: Path, tmp_path: Path) -> Path:
    """An artifact whose drafting block is not the model's own."""
    artifact = copy_of(tiny_artifact, tmp_path)
    for name in ("mtp.0.e_proj.weight", "mtp.0.h_proj.weight"):
        change(artifact, name, torch.randn(256 * 256, generator=torch.Generator().manual_seed(0)) / 16)
    return artifact


def test_weights_that_are_not_those_of_the_certificate_are_not_served(of_another: Path, tmp_path: Path) -> None:
    error, _ = without_start(of_another, tmp_path)
    assert "model-00006-of-00006.safetensors has " in error and error.endswith(" were certified")


@pytest.mark.soak  # a start: test_router's second one fails the same check, of a drafting block that is the model's own
def test_a_drafting_block_that_is_not_the_models_own_fails_the_start(
    of_another: Path, tmp_path: Path, vllm_caches: Path
) -> None:
    """As C14 was: everything loads, answers are right, and no draft is ever accepted."""
    share_caches(tmp_path / "serve", vllm_caches)
    error, hint = without_start(of_another, tmp_path, "--allow", "certificate")
    assert error.startswith("error: the probe failed: replica 0: drafts: ")
    assert hint.endswith("ALLOW=drafts")


@pytest.mark.soak  # a start: patches/vllm/check.py has the guard refuse a missing tensor, in the same vLLM's wheel
def test_a_drafting_block_that_lacks_a_tensor_fails_the_start_with_its_name(
    tiny_artifact: Path, tmp_path: Path, vllm_caches: Path
) -> None:
    share_caches(tmp_path / "serve", vllm_caches)
    artifact = copy_of(tiny_artifact, tmp_path)
    change(artifact, "mtp.0.enorm.weight", None)
    error, _ = without_start(artifact, tmp_path, "--allow", "certificate")
    assert "UninitializedWeightsError" in error and "enorm" in error
