"""patches/vllm-cpu: a real vLLM serves an artifact of models/tiny on the CPU, with drafts, and computes what we do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import TINY
from served import CHUNK, Served, calibrated

from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import MIXED
from v4forge.model import heldout
from v4forge.model.evaluation import evaluate
from v4forge.serving import client
from v4forge.serving.metrics import Counts

pytestmark = pytest.mark.serve

DRAFTS = 2
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
class Replica:
    """The first of a deployment, asked for itself."""

    served: Served

    @property
    def artifact(self) -> Path:
        return Path(self.served.deployment.artifact)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The first choice of the answer."""
        deployment = self.served.deployment
        return client.ask(deployment.endpoints[0], path, {"model": deployment.serving.model, **body})["choices"][0]

    def complete(self, tokens: list[int], **body: Any) -> dict[str, Any]:
        return self.post("/v1/completions", prompt=tokens, ignore_eos=True, logprobs=0, **body)

    def counts(self) -> Counts:
        return client.metrics(self.served.deployment.endpoints[0]).counts


def text(sequences: int, length: int) -> torch.Tensor:
    return heldout.tokens(TINY, TINY / "heldout.txt", sequences, length, 1024)


@pytest.fixture
def server(tiny: Served) -> Replica:
    return Replica(tiny)


# The last is read in pieces, and is long enough for the indexer to choose.
@pytest.mark.parametrize(("sequences", "length"), [(4, 256), (1, 2600)])
def test_a_prompt_and_what_is_generated_are_as_likely_as_our_own_forward_says(
    server: Replica, sequences: int, length: int
) -> None:
    check_likelihood(server, text(sequences, length))


@pytest.mark.soak  # a server of its own
def test_layers_that_keep_upstream_s_fp4_are_served_as_they_are(start: Callable[..., Served], tmp_path: Path) -> None:
    artifact = calibrated(tmp_path, "--recipe", MIXED)
    mixed = start(
        artifact,
        "--replicas",
        "1",
        "--drafts",
        str(DRAFTS),
        "--allow",
        "certificate",
        "--set",
        f"max-num-batched-tokens={CHUNK}",
    )
    check_likelihood(Replica(mixed), text(4, 256))


def check_likelihood(server: Replica, prompts: torch.Tensor) -> None:
    """The logarithms of probabilities that the server gives a prompt, and 40 tokens that it draws after it, are our own
    forward's. FP8 in the KV cache and another order of sums make a mean difference of 0.03; a zeroed expert shows as
    0.3 and more."""
    drawn = {"max_tokens": 40, "temperature": 0.7, "return_token_ids": True, "prompt_logprobs": 0}
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: server.complete(prompt, **drawn), prompts.tolist()))
    generated = torch.tensor([answer["token_ids"] for answer in answers])
    tokens = torch.cat([prompts, generated], dim=1)
    ours = -evaluate(Checkpoint(server.artifact, form="artifact"), tokens, torch.device("cpu")).nll
    theirs = torch.empty_like(ours)
    last = prompts.shape[1] - 1
    for row, answer in enumerate(answers):
        told = zip(answer["prompt_logprobs"][1:], prompts[row, 1:].tolist(), strict=True)
        theirs[row, :last] = torch.tensor([found[str(token)]["logprob"] for found, token in told])
        theirs[row, last:] = torch.tensor(answer["logprobs"]["token_logprobs"])
    apart = (theirs - ours).abs()
    assert apart[:, :last].mean() < 0.1
    assert apart[:, last:].mean() < 0.1


def test_drafts_are_made_and_most_first_ones_accepted(server: Replica) -> None:
    before = server.counts()
    for prompt in text(6, 150).tolist():
        server.complete(prompt, max_tokens=48, temperature=0)
    made = server.counts().since(before)
    assert made.drafts and made.draft_tokens == DRAFTS * made.drafts
    first, second = made.acceptance_at or ()
    assert 0.4 < first < 1
    assert 0.1 < second < first


def test_sampled_text_is_as_likely_with_drafts_as_the_model_says(server: Replica) -> None:
    values = []
    for prompt in text(6, 150).tolist():
        values += server.complete(prompt, max_tokens=48, temperature=1.0)["logprobs"]["token_logprobs"]
    # The mean is the model's entropy, about 2 nats; text out of nowhere has 7 = log 1024 and more.
    assert -4 < sum(values) / len(values) < -0.5


def test_an_answer_does_not_depend_on_the_cache_or_on_other_requests(server: Replica) -> None:
    prompts = text(6, 600).tolist()
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: server.complete(prompt, max_tokens=8, temperature=0), prompts))
    alone = [server.complete(prompt, max_tokens=8, temperature=0) for prompt in prompts]
    first = [[each["logprobs"]["token_logprobs"][0] for each in answers] for answers in (together, alone)]
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(first[1]), atol=0.1, rtol=0)


def test_a_required_tool_is_called(server: Replica) -> None:
    asked = [{"role": "user", "content": "How is the weather in Paris?"}]
    choice = server.post(
        "/v1/chat/completions", messages=asked, tools=[WEATHER], tool_choice="required", max_tokens=200, temperature=0
    )
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]


def test_thoughts_are_apart_from_the_answer(server: Replica) -> None:
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
