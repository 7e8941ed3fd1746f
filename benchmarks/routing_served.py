"""What routing is worth to the prefix caches of real replicas: conversations through a router, before those of a
deployment that runs.

    make serve PROFILE=tiny BACKEND=cpu
    python -m benchmarks.routing_served --folder scratch/tiny/serve --out benchmarks/results/routing-cpu

As benchmarks.routing, whose load it takes in tokens: the router of `make serve` in its two ways, and any other that
--beside names, each with conversations of its own that no cache has seen. --out gets a .json: by router the share of
the prompts' tokens that vLLM found in its caches, by its own count, and seconds to the first token.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.routing import THINK_S, command_of, load_of, parser_of, routed, write
from v4forge.errors import UserError, run_main
from v4forge.serving import client
from v4forge.serving.deployment import Deployment

QUERIES, HITS = "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"


@dataclass(frozen=True)
class Load:
    """`conversations` of so many `turns`, `at_once` of them at a time; words of the `system` prompt that all share and
    of a `question`, tokens of an answer."""

    conversations: int = 16
    turns: int = 5
    at_once: int = 8
    system: int = 200
    question: int = 60
    answer: int = 16


async def talk(
    asker: httpx.AsyncClient, model: str, seed: str, number: int, load: Load, waits: asyncio.Semaphore
) -> list[float]:
    """A conversation, turn by turn -> seconds until the first token of each answer."""
    chance, shared = random.Random(f"{seed} {number}"), random.Random(seed)
    messages = [{"role": "system", "content": words(shared, load.system)}]
    first_s = []
    async with waits:
        for _ in range(load.turns):
            messages.append({"role": "user", "content": words(chance, load.question)})
            asked = {"model": model, "messages": messages, "max_tokens": load.answer, "ignore_eos": True}
            asked |= {"stream": True, "temperature": 0}
            begun, came = time.monotonic(), 0
            async with asker.stream("POST", "/v1/chat/completions", json=asked) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and '"content"' in line.replace('"reasoning"', '"content"'):
                        came += 1
                        if came == 2:  # the one before says the role
                            first_s.append(time.monotonic() - begun)
            messages.append({"role": "assistant", "content": words(chance, load.answer)})
            await asyncio.sleep(chance.uniform(*THINK_S))
    return first_s


def words(chance: random.Random, count: int) -> str:
    return " ".join(f"w{chance.randrange(10_000)}" for _ in range(count))


def counted(deployment: Deployment) -> tuple[float, float]:
    """Tokens of prompts that the replicas have looked for in their caches, and those that were there."""
    totals = {QUERIES: 0.0, HITS: 0.0}
    for endpoint in deployment.endpoints:
        for family in text_string_to_metric_families(client.fetch(endpoint, "/metrics")):
            for sample in family.samples:
                if sample.name in totals:
                    totals[sample.name] += sample.value
    return totals[QUERIES], totals[HITS]


async def measured(command: str, port: int, deployment: Deployment, seed: str, load: Load) -> dict[str, Any]:
    """The load through the router that a command starts on `port`."""
    async with routed(command, port, 300, lists_models) as asker:
        model = str((await asker.get("/v1/models")).json()["data"][0]["id"])
        before = counted(deployment)
        waits = asyncio.Semaphore(load.at_once)
        begun = time.monotonic()
        talks = [talk(asker, model, seed, number, load, waits) for number in range(load.conversations)]
        first_s = [each for one in await asyncio.gather(*talks) for each in one]
        elapsed_s = time.monotonic() - begun
    queries, hits = (now - then for now, then in zip(counted(deployment), before, strict=True))
    cut = quantiles(first_s, n=10)
    return {"kept": hits / queries, "to_first_token_s": {"p50": cut[4], "p90": cut[8]}, "elapsed_s": elapsed_s}


async def lists_models(asker: httpx.AsyncClient) -> bool:
    return bool((await asker.get("/v1/models")).json()["data"][0]["id"])


def run(deployment: Deployment, load: Load, port: int, beside: Sequence[str]) -> dict[str, Any]:
    """Every router under the same load, in turn."""
    replicas = [f"127.0.0.1:{deployment.replica_port(number)}" for number in range(deployment.replicas)]
    urls = " ".join(f"http://{replica}" for replica in replicas)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            (name, command_of(Path(folder), port, replicas, by_prefix))
            for name, by_prefix in (("fewest requests", False), ("by prefix", True))
        ]
        for name, command in [*ours, *((each, each.format(port=port, urls=urls)) for each in beside)]:
            results[name] = asyncio.run(measured(command, port, deployment, name, load))
    return results


def main() -> None:
    parser = parser_of("benchmarks.routing_served", __doc__, Load())
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="of a deployment of this host")
    arguments = parser.parse_args()
    load = load_of(Load, arguments)
    deployment = Deployment.load(arguments.folder)
    if deployment is None or deployment.runtime != "host":
        raise UserError(f"nothing of this host is served from {arguments.folder}", "make serve BACKEND=cpu")
    results = run(deployment, load, arguments.port, arguments.beside)
    for name, row in results.items():
        seconds = ", ".join(f"{each} {value:.2f} s" for each, value in row["to_first_token_s"].items())
        print(f"{row['kept']:6.1%} kept, to the first token {seconds}, {row['elapsed_s']:.0f} s in all: {name}")
    write(arguments.out, load, results)


if __name__ == "__main__":
    run_main(main)
