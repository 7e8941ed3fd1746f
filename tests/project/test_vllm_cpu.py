"""patches/vllm-cpu: a real vLLM serves an artifact of models/tiny on the CPU, with drafts, and computes what we do."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import run_module

from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import MIXED
from v4forge.model import heldout
from v4forge.model.evaluation import evaluate
from v4forge.serving.settings import serving

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
ENVIRONMENT = ROOT / ".venv-serve-cpu"
sys.path.append(str(ROOT / "patches" / "vllm-cpu" / "plugin"))

from v4forge_vllm_cpu import metadata, routing  # noqa: E402  (what imports nothing of vLLM)

NAME = "tiny"
DRAFTS = 2
CHUNK = 512  # tokens of a step; longer prompts are read in pieces
OPTIONS = (
    *("--served-model-name", NAME, "--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", str(CHUNK)),
    *("--kv-cache-dtype", "fp8", "--block-size", "256", "--max-model-len", "4096"),
    *("--tokenizer-mode", "deepseek_v4", "--tool-call-parser", "deepseek_v4", "--enable-auto-tool-choice"),
    *("--reasoning-parser", "deepseek_v4", "--speculative-config.method", "mtp"),
    *("--speculative-config.num_speculative_tokens", str(DRAFTS)),
)
START_S = 150  # 20 s on two idle cores
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            # Of a free string a small model need not find the end.
            "properties": {"city": {"type": "string", "enum": ["Berlin", "Paris"]}},
            "required": ["city"],
        },
    },
}


@dataclass(frozen=True)
class Server:
    url: str
    artifact: Path

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The first choice of the answer."""
        request = urllib.request.Request(
            self.url + path, json.dumps({"model": NAME, **body}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=90) as answer:
            return json.load(answer)["choices"][0]

    def complete(self, tokens: list[int], **body: Any) -> dict[str, Any]:
        return self.post("/v1/completions", prompt=tokens, ignore_eos=True, logprobs=0, **body)

    def drafts(self) -> dict[str, float]:
        """The counters of drafts; those of a position by `<name> <position>`."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = {}
        for name, labels, value in re.findall(r"^vllm:spec_decode_num_(\w+)_total\{(.*)\} (\S+)$", text, flags=re.M):
            position = re.search(r'position="(\d+)"', labels)
            found[f"{name} {position[1]}" if position else name] = float(value)
        return found


@dataclass(frozen=True)
class Batch:
    """Requests as vLLM describes them: tokens scheduled and seen of each, first blocks, blocks of 4."""

    scheduled: list[int]
    seen: list[int]

    @property
    def starts(self) -> torch.Tensor:
        return torch.tensor([0, *self.scheduled]).cumsum(0).to(torch.int32)

    @property
    def lengths(self) -> torch.Tensor:
        return torch.tensor([a + b for a, b in zip(self.scheduled, self.seen, strict=True)], dtype=torch.int32)

    @property
    def blocks(self) -> torch.Tensor:
        """[requests, 12] i32, every block another."""
        return torch.randperm(12 * len(self.seen), generator=torch.Generator().manual_seed(0)).view(-1, 12).int()

    def tokens(self) -> Iterator[tuple[int, int, int]]:
        """(place in the batch, request, position) of each token."""
        place = 0
        for request, (scheduled, seen) in enumerate(zip(self.scheduled, self.seen, strict=True)):
            for position in range(seen, seen + scheduled):
                yield place, request, position
                place += 1


BATCHES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=4).map(
    lambda rows: Batch(*map(list, zip(*rows, strict=True)))
)


@given(batch=BATCHES, ratio=st.sampled_from([1, 4]))
@settings(deadline=None)
def test_a_token_that_completes_a_compressed_state_gets_its_slot(batch: Batch, ratio: int) -> None:
    slots = torch.arange(sum(batch.scheduled))
    slots[-1] = metadata.PAD  # cached already
    found = torch.full_like(slots, 7)
    metadata.compressed_slots(
        found, slots, batch.starts, batch.lengths, batch.blocks, 12, 4, 1, 1, ratio, metadata.PAD, 1024
    )
    for place, request, position in batch.tokens():
        done = (position + 1) % ratio == 0 and place != len(slots) - 1
        state = position // ratio
        assert found[place] == (4 * batch.blocks[request, state // 4] + state % 4 if done else metadata.PAD)


@given(batch=BATCHES, ratio=st.sampled_from([1, 4]), slice_=st.tuples(st.integers(0, 5), st.integers(1, 40)))
@settings(deadline=None)
def test_a_token_of_a_chunk_sees_the_compressed_keys_before_it(
    batch: Batch, ratio: int, slice_: tuple[int, int]
) -> None:
    tokens = sum(batch.scheduled)
    start, stop = min(slice_[0], tokens), min(sum(slice_), tokens)
    keys = [int(length) // ratio for length in batch.lengths]
    cumulative = torch.tensor([0, *keys]).cumsum(0).int()
    owners, first, last = torch.full((sum(keys),), -1), torch.full((stop - start,), -1), torch.full((stop - start,), -1)
    metadata.prefill_chunk(
        batch.starts, batch.lengths, cumulative, cumulative, owners, first, last, start, stop, 0, 1, 1, 1024, ratio
    )
    assert owners.tolist() == [request for request, count in enumerate(keys) for _ in range(count)]
    expected = [
        (int(cumulative[request]), int(cumulative[request]) + (position + 1) // ratio)
        for place, request, position in batch.tokens()
        if start <= place < stop
    ]
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == expected


@given(batch=BATCHES)
def test_each_token_is_mapped_to_its_request(batch: Batch) -> None:
    tokens = sum(batch.scheduled)
    found = torch.full((tokens + 3,), -1, dtype=torch.int32)
    metadata.token_requests(batch.starts, found, len(batch.seen), tokens, tokens + 2, num_warps=4)
    assert found.tolist() == [request for _, request, _ in batch.tokens()] + [0, 0, -1]


@given(seen=st.lists(st.integers(0, 30), min_size=1, max_size=4), width=st.integers(1, 4))
def test_drafts_become_rows_that_see_one_token_more_each(seen: list[int], width: int) -> None:
    batch = Batch([width] * len(seen), seen)
    rows = len(seen) * width
    lengths, table, ones = torch.zeros(rows + 1), torch.zeros(rows + 1, 14, dtype=torch.int32), torch.zeros(rows + 1)
    metadata.uniform_decode(batch.lengths, lengths, batch.blocks, 12, table, 14, ones, width, BLOCK_SIZE=1024)
    assert lengths.tolist() == [position + 1 for _, _, position in batch.tokens()] + [0]
    assert table[:rows, :12].equal(batch.blocks.repeat_interleave(width, dim=0))
    assert ones.tolist() == [1] * rows + [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_a_setting_of_a_request_is_that_of_its_draft_tokens(dtype: torch.dtype) -> None:
    found = torch.full((4,), 9, dtype=dtype)
    metadata.expand(found, torch.tensor([3, -1, 5], dtype=dtype) / 2, torch.tensor([2, 3, 3]), -0.5, 1, 32)
    expected = [1.5, 1.5, 1.0, 9.0] if dtype.is_floating_point else [1, 1, 1, 9]
    assert found.tolist() == expected


@given(seed=st.integers(0, 99), hashed=st.booleans())
def test_experts_are_chosen_by_score_and_bias_and_weighed_by_score(seed: int, hashed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(5, 8, generator=generator), torch.randn(8, generator=generator)
    table = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(20)]).int()
    words = torch.randint(20, (5,), generator=generator)
    weights, chosen = routing.route(logits, 2, True, None if hashed else bias, 1.5, words, table if hashed else None)
    for token in range(5):
        scores = [math.sqrt(math.log1p(math.exp(logit))) for logit in logits[token].tolist()]
        best = sorted(range(8), key=lambda expert: -(scores[expert] + float(bias[expert])))[:2]
        assert set(chosen[token].tolist()) == set(table[words[token]].tolist() if hashed else best)
        picked = [scores[expert] for expert in chosen[token].tolist()]
        assert weights[token].tolist() == pytest.approx([1.5 * score / sum(picked) for score in picked], rel=1e-5)


def text(sequences: int, length: int) -> torch.Tensor:
    return heldout.tokens(TINY, TINY / "heldout.txt", sequences, length, 1024)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, vllm_caches: Path) -> Iterator[Server]:
    """Of an artifact by GPTQ, half of whose scales are negative."""
    with served(tmp_path_factory.mktemp("vllm-cpu"), vllm_caches) as found:
        yield found


@contextmanager
def served(folder: Path, vllm_caches: Path, *options: str) -> Iterator[Server]:
    """A vLLM of an artifact that is calibrated with these options."""
    work, artifact = folder / "layers", folder / "artifact"
    text = ("--corpus", TINY / "calibration.jsonl", "--samples", "8", "--seq-len", "256")
    run_module("calibrate", "--source", TINY, "--work", work, *text, *options)
    run_module("postprocess", "--source", TINY, "--work", work, "--out", artifact)
    log = folder / "log.txt"
    program = ENVIRONMENT / "bin" / "vllm"
    assert program.exists(), "python -m scripts.env --environment serve-cpu --into .venv-serve-cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = os.environ | serving("published", "cpu", {}).variables(str(vllm_caches))
    command = [program, "serve", artifact, "--host", "127.0.0.1", "--port", str(port), *OPTIONS]
    with log.open("w") as written:
        process = subprocess.Popen(
            command, env=variables, cwd=folder, stdout=written, stderr=written, start_new_session=True
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
        yield Server(f"http://127.0.0.1:{port}", artifact)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


# The last is read in pieces, and is long enough for the indexer to choose.
@pytest.mark.serve
@pytest.mark.parametrize(("sequences", "length"), [(4, 256), (1, 2600)])
def test_the_served_log_probabilities_are_those_of_our_own_forward(server: Server, sequences: int, length: int) -> None:
    assert difference(server, text(sequences, length)) < 0.1


@pytest.mark.serve
@pytest.mark.soak  # a server of its own
def test_layers_that_keep_upstream_s_fp4_are_served_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, vllm_caches: Path
) -> None:
    with served(tmp_path_factory.mktemp("vllm-cpu-mixed"), vllm_caches, "--recipe", MIXED) as mixed:
        assert difference(mixed, text(4, 256)) < 0.1


def difference(server: Server, tokens: torch.Tensor) -> float:
    """The mean one between the served logarithms of probabilities of a text and our own forward's. FP8 in the KV cache
    and another order of sums make 0.03; a zeroed expert shows as 0.3 and more."""
    ours = -evaluate(Checkpoint(server.artifact, form="artifact"), tokens, torch.device("cpu")).nll
    theirs = torch.empty_like(ours)
    for row, prompt in enumerate(tokens.tolist()):
        found = server.complete(prompt, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
        theirs[row] = torch.tensor([found[n][str(prompt[n])]["logprob"] for n in range(1, len(prompt))])
    return float((theirs - ours).abs().mean())


@pytest.mark.serve
@pytest.mark.parametrize("length", [150, 2600])
def test_what_is_generated_is_as_likely_as_our_own_forward_says(server: Server, length: int) -> None:
    prompts = text(1, 3 * length).view(3, length).tolist() if length < CHUNK else text(1, length).tolist()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(
            pool.map(lambda p: server.complete(p, max_tokens=40, temperature=0.7, return_token_ids=True), prompts)
        )
    tokens = torch.tensor([prompt + answer["token_ids"] for prompt, answer in zip(prompts, answers, strict=True)])
    ours = -evaluate(Checkpoint(server.artifact, form="artifact"), tokens, torch.device("cpu")).nll[:, length - 1 :]
    served = torch.tensor([answer["logprobs"]["token_logprobs"] for answer in answers], dtype=torch.float64)
    assert (served - ours).abs().mean() < 0.1


@pytest.mark.serve
def test_drafts_are_made_and_most_first_ones_accepted(server: Server) -> None:
    before = server.drafts()
    for prompt in text(6, 150).tolist():
        server.complete(prompt, max_tokens=48, temperature=0)
    made = {name: value - before.get(name, 0) for name, value in server.drafts().items()}
    assert made["draft_tokens"] == DRAFTS * made["drafts"] > 0
    first, second = (made[f"accepted_tokens_per_pos {n}"] / made["drafts"] for n in range(DRAFTS))
    assert 0.4 < first < 1
    assert 0.1 < second < first


@pytest.mark.serve
def test_sampled_text_is_as_likely_with_drafts_as_the_model_says(server: Server) -> None:
    values = []
    for prompt in text(6, 150).tolist():
        values += server.complete(prompt, max_tokens=48, temperature=1.0)["logprobs"]["token_logprobs"]
    # The mean is the model's entropy, about 2 nats; text out of nowhere has 7 = log 1024 and more.
    assert -4 < sum(values) / len(values) < -0.5


@pytest.mark.serve
def test_an_answer_does_not_depend_on_the_cache_or_on_other_requests(server: Server) -> None:
    prompts = text(6, 600).tolist()
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=8, temperature=0), prompts))
    alone = [server.complete(prompt, max_tokens=8, temperature=0) for prompt in prompts]
    first = [[each["logprobs"]["token_logprobs"][0] for each in answers] for answers in (together, alone)]
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(first[1]), atol=0.1, rtol=0)


@pytest.mark.serve
def test_a_required_tool_is_called(server: Server) -> None:
    asked = [{"role": "user", "content": "How is the weather in Paris?"}]
    choice = server.post(
        "/v1/chat/completions", messages=asked, tools=[WEATHER], tool_choice="required", max_tokens=200, temperature=0
    )
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]


@pytest.mark.serve
def test_thoughts_are_apart_from_the_answer(server: Server) -> None:
    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    message = server.post(
        "/v1/chat/completions",
        messages=asked,
        max_tokens=24,
        temperature=0,
        chat_template_kwargs={"thinking": True},
    )["message"]
    assert message["reasoning"]
    assert not message["content"]
