"""Clients of an OpenAI-compatible endpoint, many at a time, that keep what became of each request; and the server's
processes, to end them meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

PIN = "x-v4forge-replica"
LIMIT_S = 240.0


@dataclass
class Outcome:
    """One request. `text` is what arrived of the answer; `error` why it ended early, "" when it did not; `after_s` when
    it may come again, 0 where that is not said."""

    status: int = 0
    replica: str = ""
    text: str = ""
    finish: str = ""
    error: str = ""
    after_s: int = 0
    body: Any = field(default=None, repr=False)

    @property
    def whole(self) -> bool:
        return self.status == 200 and not self.error and bool(self.finish)


def message(content: str, tokens: int, stream: bool = False, **more: Any) -> dict[str, Any]:
    """A chat request to whatever model is served; it is answered with exactly so many tokens."""
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    } | more


async def ask(client: httpx.AsyncClient, request: Mapping[str, Any]) -> Outcome:
    """Sends a chat request; a streamed answer is read as it comes."""
    outcome = Outcome()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=request) as answer:
            outcome.status, outcome.replica = answer.status_code, answer.headers.get(PIN, "")
            outcome.after_s = int(answer.headers.get("Retry-After", 0))
            if not request["stream"] or answer.status_code != 200:
                outcome.body = json.loads(await answer.aread())
                if answer.status_code == 200:
                    choice = outcome.body["choices"][0]
                    outcome.text = _text(choice["message"])
                    outcome.finish = choice["finish_reason"]
                return outcome
            async for line in answer.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:  # the engine has died under it
                        outcome.error = json.dumps(event["error"])
                    for choice in event.get("choices", ()):
                        outcome.text += _text(choice["delta"])
                        outcome.finish = choice["finish_reason"] or outcome.finish
    except (httpx.HTTPError, ValueError) as error:
        outcome.error = repr(error)
    return outcome


def _text(part: Mapping[str, Any]) -> str:
    return (part.get("reasoning") or "") + (part.get("content") or "")


def ask_all(
    url: str, requests: Sequence[Mapping[str, Any]], key: str = "", meanwhile: Callable[[], None] | None = None
) -> list[Outcome]:
    """All requests at once; `meanwhile` runs in a thread beside them."""

    async def run() -> list[Outcome]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # An idle connection would keep a router from its end for a minute.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=LIMIT_S, limits=limits) as client:
            beside = asyncio.create_task(asyncio.to_thread(meanwhile or (lambda: None)))
            outcomes = await asyncio.gather(*(ask(client, request) for request in requests))
            await beside
            return outcomes

    return asyncio.run(run())


def processes(port: int) -> dict[int, str]:
    """The process of vllm that listens on `port`, and below it its engine's: id -> command line."""
    listed = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    found = {int(pid): words for pid, _, words in rows if f"--port {port} " in words and "serve" in words}
    while more := {int(pid): words for pid, parent, words in rows if int(parent) in found and int(pid) not in found}:
        found |= more
    return found


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
