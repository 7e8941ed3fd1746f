"""A conversation with a served model, streamed: its replies as they come, and what each took.

The page at / of the router, docker/serve/chat.html, asks and counts the same way.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx

from v4forge import http_clients, network
from v4forge.errors import UserError
from v4forge.network import Network
from v4forge.serving import client
from v4forge.serving.client import form_of, short

COMMAND = "make chat"
COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
REASONING = ("reasoning", "reasoning_content")  # the second is vLLM's older name
STATUS = "make serve-status"
# What a refusal means, by its status.
WORDS = {
    400: "the server does not take this",
    404: "the server does not have this",
    422: "this request is refused",
    429: "not now",
    503: "nothing answers",
    504: "nothing answers",
}


@dataclass
class Reply:
    """A reply so far: what was said and thought; `events` that brought some of it; times of the clock, `first_s` and
    `last_s` of those, 0 before. `usage` and `metrics` are the server's own count, `finish` why it ended."""

    begun_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    text: str = ""
    thoughts: str = ""
    events: int = 0
    usage: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    finish: str = ""

    @property
    def figures(self) -> str:
        """What it took: tokens as the server counts them, times as they are here; the drafts that were accepted, where
        the server tells, and else how many tokens an event brings, which without drafts is one."""
        tokens = self.usage.get("completion_tokens")
        count, unit = (self.events, "event") if tokens is None else (tokens, "token")
        parts = [f"{count} {unit}{'s' * (count != 1)}"] if count else []
        if self.first_s:
            parts.append(f"the first after {_seconds(self.first_s - self.begun_s)}")
        if tokens and tokens > 1 and self.last_s > self.first_s:
            parts.append(f"{(tokens - 1) / (self.last_s - self.first_s):.1f} tok/s")
        drafts = self.metrics.get("speculative_decoding") or {}
        if made := drafts.get("num_draft_tokens"):
            accepted = drafts.get("num_accepted_draft_tokens", 0)
            parts.append(f"{accepted} of {made} drafts accepted ({accepted / made:.0%})")
        elif tokens and 0 < self.events < tokens:
            parts.append(f"{tokens / self.events:.1f} tokens an event")
        if self.finish == "length":
            parts.append("cut at its limit")
        return ", ".join(parts)

    def take(self, event: Mapping[str, Any], now_s: float) -> tuple[str, str]:
        """Adds an event of the stream -> what was thought and what was said in it. Raises UserError for an error."""
        if event.get("error"):
            said = event["error"].get("message", "it does not say why")
            raise UserError(f"the server has failed: {short(said)}", client.LOGS)
        self.usage = event.get("usage") or self.usage
        self.metrics = event.get("metrics") or self.metrics
        choice: Mapping[str, Any] = next(iter(event.get("choices") or ()), {})
        self.finish = choice.get("finish_reason") or self.finish
        delta = choice.get("delta") or {}
        thought = next((str(delta[name]) for name in REASONING if delta.get(name)), "")
        said = str(delta.get("content") or "")
        if thought or said:
            self.last_s = now_s
            self.first_s = self.first_s or now_s
            self.events += 1
            self.thoughts += thought
            self.text += said
        return thought, said


@dataclass
class Chat:
    """A conversation with the model that is served at `url`, http://host:port: `turns` as the API takes them, `system`,
    `thinking` and `max_tokens`, 0 for what fits, for those to come. `proxied`: whether a proxy may stand between."""

    url: str
    key: str = field(default="", repr=False)
    model: str = ""
    system: str = ""
    thinking: bool = False
    max_tokens: int = 0
    proxied: bool = True
    context: int | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def meet(self) -> None:
        """Finds which model is served, `model` where that is named. Raises UserError where it is not."""
        with self._answer("GET", MODELS) as answer, form_of(f"{self.url}{MODELS}"):
            answer.read()
            found = client.chosen(self.url, answer.json()["data"], self.model, COMMAND)
            self.model, self.context = str(found["id"]), found.get("max_model_len")

    def say(self, prompt: str, reply: Reply) -> Generator[tuple[str, str]]:
        """What is thought and said in reply, as it comes; all of it is in `reply`. A reply that has said something is
        part of the conversation, whole or not, and else the prompt is not either. Raises UserError where none comes,
        and where it breaks off."""
        asked = [{"role": "user", "content": prompt}]
        told = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {
            "model": self.model,
            "messages": told + self.turns + asked,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "chat_template_kwargs": {"thinking": self.thinking},
        }
        if self.max_tokens:
            body["max_tokens"] = self.max_tokens
        try:
            with self._answer("POST", COMPLETIONS, body) as answer:
                for data in events(answer.iter_lines()):
                    if data == "[DONE]":
                        return
                    with form_of(f"{self.url}{COMPLETIONS}"):
                        piece = reply.take(json.loads(data), monotonic())
                    yield piece
            raise UserError("the answer was cut off: the server that gave it has gone", STATUS)
        finally:
            if reply.text:
                self.turns += [*asked, {"role": "assistant", "content": reply.text}]

    @contextmanager
    def _answer(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[httpx.Response]:
        """An answer that is none of refusal, to be read. Raises UserError for another, and where it breaks off."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        where = f"{self.url}{path}"
        try:
            with (
                http_clients.client(None if self.proxied else Network({})) as http,
                http.stream(method, where, json=body, headers=headers) as answer,
            ):
                if answer.status_code != 200:
                    answer.read()
                    raise refused(answer, bool(self.key))
                yield answer
        except httpx.TimeoutException:
            raise UserError(f"{where} has said nothing for {network.READ_S:.0f} s", STATUS) from None
        except httpx.ConnectError as error:
            if network.is_distrust(error):
                raise network.distrusted(where, error) from None
            raise UserError(f"{where} cannot be reached: {error}", f"{STATUS}, or {COMMAND} URL=<address>") from None
        except httpx.HTTPError as error:
            raise UserError(f"{where}: the connection broke off: {type(error).__name__}", STATUS) from None


def events(lines: Iterator[str]) -> Iterator[str]:
    """The data of server-sent events. Comments, which keep a stream alive, are no events."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data = []


def refused(answer: httpx.Response, with_key: bool) -> UserError:
    """What the status of an answer that was read, and its text, mean."""
    status = answer.status_code
    if status == 401:
        fact = "the server does not know this API key" if with_key else "the server asks for an API key"
        return UserError(fact, f"{COMMAND} API_KEY_FILE=<file>")
    try:
        told = answer.json()
        said = str((told.get("error") or told).get("message") or "")
    except (ValueError, AttributeError):
        said = ""
    fact = f"{WORDS.get(status, 'the server has failed' if status >= 500 else 'the server refuses')} ({status})"
    after_s = network.retry_after(answer.headers.get("Retry-After"))
    hints = {400: "/reset begins a new conversation", 404: f"{COMMAND} MODEL=<name>"}
    hint = hints.get(status, client.LOGS) if after_s is None else f"try again in {after_s:.0f} s"
    return UserError(f"{fact}: {said}" if said else fact, hint)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 9.95 else f"{seconds:.1f} s"
