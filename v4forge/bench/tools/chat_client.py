"""One turn of a conversation with a served model, deterministic: greedy, seeded, not streamed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from v4forge.errors import UserError
from v4forge.serving import client
from v4forge.serving.client import Endpoint, form_of

PATH = "/v1/chat/completions"
REASONING = ("reasoning", "reasoning_content")  # the second is vLLM's older name
# Of vLLM's refusals of a prompt, or of a prompt and `max_tokens`, that are too long.
TOO_LONG = ("context length", "too large", "max_model_len", "longer than the maximum")


class TooLong(UserError):
    """The conversation does not fit into what the server takes."""


@dataclass(frozen=True)
class Speaker:
    """Who is asked, and how: `limit_s` for one answer, `max_tokens` of it at most."""

    at: Endpoint
    model: str
    max_tokens: int
    seed: int
    limit_s: float
    thinking: bool = False

    def sampling(self) -> dict[str, Any]:
        return {
            "temperature": 0,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "chat_template_kwargs": {"thinking": self.thinking},
        }


@dataclass(frozen=True)
class Asked:
    """A call as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """An answer: its text, its calls, its thoughts under the name that they came with; why it ended."""

    text: str
    calls: Sequence[Asked] = ()
    thoughts: Mapping[str, str] = field(default_factory=dict)
    finish: str = "stop"
    usage: Mapping[str, Any] = field(default_factory=dict)


def reply(speaker: Speaker, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> Reply:
    """The model's next turn.

    Where `max_tokens` more than the prompt do not fit, as many as fit. Raises TooLong when the prompt alone does not,
    UserError when the server does not answer as an OpenAI-compatible one does.
    """
    body = {"model": speaker.model, "messages": list(messages), **speaker.sampling()}
    if tools:
        body |= {"tools": list(tools), "tool_choice": "auto"}
    try:
        return _ask(speaker, body)
    except TooLong:
        return _ask(speaker, {name: value for name, value in body.items() if name != "max_tokens"})


def _ask(speaker: Speaker, body: Mapping[str, Any]) -> Reply:
    try:
        answer = client.ask(speaker.at, PATH, body, speaker.limit_s)
    except UserError as error:
        if "HTTP 400" in error.fact and any(words in error.fact for words in TOO_LONG):
            hint = 'serve with a longer context: make serve SET="max-model-len=8192"'
            raise TooLong(f"the conversation is longer than the server takes: {error.fact}", hint) from None
        raise
    with form_of(f"POST {PATH}"):
        choice = answer["choices"][0]
        message = choice["message"]
        called = [each["function"] for each in message.get("tool_calls") or ()]
        return Reply(
            text=_string(message.get("content")),
            calls=[Asked(_string(each["name"]), _string(each.get("arguments"))) for each in called],
            thoughts={name: _string(message[name]) for name in REASONING if message.get(name)},
            finish=_string(choice.get("finish_reason")),
            usage=dict(answer.get("usage") or {}),
        )


def _string(value: Any) -> str:
    """Text as it is, nothing as "", anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
