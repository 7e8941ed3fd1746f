"""What a message of a conversation may be, in the OpenAI form; what the format makes of them is chat_format's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from v4forge.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
UNSUPPORTED_KEYS = ("task", "response_format", "wo_eos")
# Of a field that is not of its type: what is told of the message, and what to write.
TOLD = {
    "reasoning": ("reasoning is not a string", "give `reasoning` as a string"),
    "reasoning_content": ("reasoning is not a string", "give `reasoning_content` as a string"),
    "tool_call_id": ("tool_call_id is not a string", "give the `id` of the call that it answers"),
    "tool_calls": (
        "a tool call without a name and a JSON object of arguments",
        'write {"function": {"name": "...", "arguments": "{...}"}}',
    ),
    "tools": ("a declared tool has no `function`", 'declare {"type": "function", "function": {...}}'),
}


def refused(fact: str, hint: str) -> PydanticCustomError:
    """What a validator raises: what is wrong, and what to do."""
    return PydanticCustomError("refused", "{fact}", {"fact": fact, "hint": hint})


def _joined(content: Any) -> str | None:
    """The content as one string; a list of text blocks is joined by blank lines."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [block.get("text") for block in content if isinstance(block, dict) and block.get("type") == "text"]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) == len(content):
            return "\n\n".join(strings)
        raise refused("holds something other than text", "leave images and other blocks out")
    raise refused(f"content is a {type(content).__name__}", "give `content` as a string")


def _object(arguments: Any) -> Any:
    """The arguments of a call, which may come as JSON."""
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _or_none(value: Any) -> Any:
    """Nothing, however a data set writes it: null, "" and [] are no tool calls and no tools."""
    return value or None


class _Part(BaseModel):
    """An object of which only these fields are read, each of its type."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, defer_build=True)


class Called(_Part):
    name: str
    arguments: Annotated[dict[Any, Any], BeforeValidator(_object)]  # names of JSON, which are texts


class Call(_Part):
    function: Called
    id: str | None = None


class Tool(_Part):
    function: dict[Any, Any]


class Message(_Part):
    """One message; what may be left out is None."""

    role: Role
    content: Annotated[str | None, BeforeValidator(_joined)] = None
    reasoning: Annotated[str | None, BeforeValidator(_or_none)] = None
    reasoning_content: Annotated[str | None, BeforeValidator(_or_none)] = None
    tool_calls: Annotated[list[Call] | None, BeforeValidator(_or_none)] = None
    tool_call_id: str | None = None
    tools: Annotated[list[Tool] | None, BeforeValidator(_or_none)] = None

    @model_validator(mode="before")
    @classmethod
    def _has_what_its_role_has(cls, message: Any) -> Any:
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise refused("is not an object with a role", 'write {"role": "user", "content": "..."}')
        if role not in get_args(Role):
            raise refused(f"has the role {role!a}", f"use one of {', '.join(get_args(Role))}")
        for key in UNSUPPORTED_KEYS:
            if message.get(key):
                raise refused(f"carries '{key}', which is not supported", "remove that key")
        if message.get("tools") and role != "system":
            raise refused(": only a system message declares tools", "move `tools` to a system message")
        if message.get("tool_calls") and role != "assistant":
            raise refused(": only the assistant calls tools", "move `tool_calls` to an assistant message")
        if role == "user" and message.get("content") is None:
            raise refused("has no content", "give its `content` as a string")
        return message

    @property
    def text(self) -> str:
        return self.content or ""

    @property
    def reason(self) -> str:
        return self.reasoning or self.reasoning_content or ""


def parsed(messages: Sequence[Any], tools: Any = None) -> tuple[list[Message], list[Tool]]:
    """The messages, and the tools that are declared for all of them. Raises UserError, by a message's number."""
    found = [_parsed(message, f"message {index}") for index, message in enumerate(messages)]
    if not tools:
        return found, []
    return found, _parsed({"role": "system", "tools": tools}, "`tools`").tools or []


def _parsed(message: Any, what: str) -> Message:
    try:
        return Message.model_validate(message)
    except ValidationError as error:
        first: Mapping[str, Any] = error.errors()[0]
    told = first.get("ctx", {}) if first["type"] == "refused" else {}
    name = first["loc"][0] if first["loc"] else ""
    fact, hint = told.get("fact"), told.get("hint")
    if fact is None or hint is None:
        fact, hint = TOLD.get(str(name), (f"{name or 'it'} is of another form", "correct it, or leave it out"))
        fact = f": {fact}"
    elif name:
        fact = f": {fact}"
    raise UserError(f"{what}{fact}" if fact.startswith(":") else f"{what} {fact}", hint)
