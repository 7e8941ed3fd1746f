"""Clients that ask an endpoint again and again, stream or not, and leave at random; and what became of all of it.

They do what they are told: an answer with Retry-After, 429 or 503, is asked for again after that.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.clients import LIMIT_S, Outcome, ask, message

LEAVES = 0.3  # of all requests
LEAVES_AFTER_S = (0.02, 1.5)
LONG = 1000  # tokens, which no machine has written by then
THINKS_S = (0.1, 0.6)
TOLD = (429, 503)
WORDS = ("some", "few", "words", "of", "no", "meaning", "at", "all")


@dataclass
class Crowd:
    """What became of the requests of a crowd. `asked_again` counts answers with Retry-After."""

    whole: list[Outcome] = field(default_factory=list)
    left: int = 0
    cut: list[Outcome] = field(default_factory=list)  # in the middle of an answer
    lost: list[tuple[dict[str, Any], Outcome]] = field(default_factory=list)
    asked_again: int = 0


def gather(
    url: str, key: str, clients: int, seconds: float, seed: str, meanwhile: Callable[[], None] = lambda: None
) -> Crowd:
    """Lets so many clients ask for so long, and `meanwhile` run beside them; what has begun by then is waited for."""
    crowd = Crowd()

    async def run() -> None:
        headers, end = {"Authorization": f"Bearer {key}"}, time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=LIMIT_S, limits=limits) as client:
            beside = asyncio.create_task(asyncio.to_thread(meanwhile))
            draws = [random.Random(f"{seed} {number}") for number in range(clients)]
            await asyncio.gather(*(_client(crowd, client, draw, end) for draw in draws))
            await beside

    asyncio.run(run())
    return crowd


async def _client(crowd: Crowd, client: httpx.AsyncClient, draw: random.Random, end: float) -> None:
    while time.monotonic() < end:
        length = 1500 if draw.random() < 0.05 else draw.randrange(1, 40)
        words = " ".join(draw.choice(WORDS) for _ in range(length))
        leaves = draw.random() < LEAVES
        tokens = LONG if leaves else draw.randrange(4, 40)
        request = message(f"{draw.random()} {words}", tokens=tokens, stream=draw.random() < 0.5)
        asking = asyncio.create_task(_ask(crowd, client, request))
        if leaves:
            await asyncio.wait([asking], timeout=draw.uniform(*LEAVES_AFTER_S))
            if asking.cancel():
                crowd.left += 1
                await asyncio.wait([asking])
        else:
            await asking
        await asyncio.sleep(draw.uniform(*THINKS_S))


async def _ask(crowd: Crowd, client: httpx.AsyncClient, request: dict[str, Any]) -> None:
    end = time.monotonic() + LIMIT_S
    while True:
        outcome = await ask(client, request)
        if outcome.whole:
            crowd.whole.append(outcome)
        elif outcome.status in TOLD and outcome.after_s and time.monotonic() < end:
            crowd.asked_again += 1
            await asyncio.sleep(outcome.after_s)
            continue
        elif outcome.text:
            crowd.cut.append(outcome)
        else:
            crowd.lost.append((request, outcome))
        return
