"""The tool-calling scenarios, bench/data/tools/*.yaml: the same tools for all, mocked answers, rules that score.

suite.yaml says what all share; each other file is a category. Every fault is told with file, line and scenario.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import jsonschema
from pydantic import AfterValidator, Field, field_validator, model_validator

from v4forge.bench.tools import strict_yaml, value_matchers
from v4forge.bench.tools.call_assertions import Rule, Rules, ToolName, Tools
from v4forge.bench.tools.strict_yaml import HINT, Model, each_once, fault
from v4forge.bench.tools.value_matchers import AnyMatcher
from v4forge.errors import UserError

FOLDER = Path(__file__).parents[1] / "data" / "tools"
SUITE = "suite.yaml"
CATEGORIES = ("selection", "precision", "chains", "restraint", "recovery")
EACH = 3  # scenarios a category
Message = dict[str, Any]


class Tool(Model):
    """changes: whether a call that succeeds changes something."""

    name: str
    description: str
    parameters: dict[str, Any]
    changes: bool = False

    @field_validator("parameters")
    @classmethod
    def _is_schema(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            jsonschema.Draft202012Validator.check_schema(parameters)
        except jsonschema.SchemaError as error:
            raise fault(f"is no JSON schema: {error.message}") from None
        if parameters.get("type") != "object":
            raise fault("type: has to be object")
        return parameters

    @model_validator(mode="after")
    def _enter(self, info: Tools) -> Self:
        """Puts the tool into the context, by which rules, results and messages know the tools that there are."""
        if self.name in info.context:
            raise fault(f"{self.name} is there twice", "name")
        info.context[self.name] = self
        return self

    def offer(self) -> dict[str, Any]:
        """The tool in the API's form."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def fault(self, arguments: Mapping[str, Any]) -> str:
        """What the arguments do not keep of the schema, "" when they keep it; unknown ones are a fault too."""
        schema = {**self.parameters, "additionalProperties": False}
        error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(arguments))
        if error is None:
            return ""
        return f"{'.'.join(map(str, error.absolute_path)) or 'arguments'}: {error.message}"


class Result(Model):
    """What a tool answers to calls whose arguments fit: in order, the last one again and again."""

    tool: ToolName
    where: dict[str, AnyMatcher] = Field(default={})
    answers: list[Any] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_arguments(self, info: Tools) -> Self:
        for name in self.where:
            if name not in info.context[self.tool].parameters.get("properties", {}):
                raise fault(f"is no argument of {self.tool}", "where", name)
        return self

    def fits(self, tool: str, arguments: Mapping[str, Any]) -> bool:
        return tool == self.tool and not value_matchers.missing(self.where, arguments)


class GivenCall(Model):
    """A call that is part of a scenario's beginning."""

    name: ToolName
    arguments: dict[str, Any]

    @model_validator(mode="after")
    def _fits(self, info: Tools) -> Self:
        if said := info.context[self.name].fault(self.arguments):
            raise fault(said, "arguments")
        return self


class Said(Model):
    """A message of a scenario's beginning."""

    role: Literal["user", "assistant", "tool"]
    content: Any
    tool_calls: list[GivenCall] = Field(default=[])

    @model_validator(mode="after")
    def _of_its_role(self) -> Self:
        if self.role != "tool" and not isinstance(self.content, str):
            raise fault(f"{self.content!r} is not text", "content")
        if self.role != "assistant" and self.tool_calls:
            raise fault("only the assistant calls tools", "tool_calls")
        return self


def _answered(messages: list[Said]) -> list[Said]:
    """The messages, if each answer of a tool has a call before it, and each call an answer after it."""
    unanswered = 0
    for number, said in enumerate(messages):
        unanswered += len(said.tool_calls) - (said.role == "tool")
        if unanswered < 0:
            raise fault("no call before it is without an answer", number, "role")
    if not messages or messages[-1].role != "user" or unanswered:
        raise fault("have to end with the user's, every call before it answered")
    return messages


class Row(Model):
    """A scenario as it is in the file."""

    id: str
    about: str
    messages: Annotated[list[Said], AfterValidator(_answered)]
    results: list[Result] = Field(default=[])
    passes: Rules = Field(alias="pass")
    partial: Rules


class Category(Model):
    category: str
    scenarios: list[Row]

    @field_validator("scenarios")
    @classmethod
    def _as_many(cls, rows: list[Row]) -> list[Row]:
        if len(rows) != EACH:
            raise fault(f"{len(rows)}, not {EACH}: the score is of {2 * EACH} points a category")
        each_once(((number, "id"), row.id) for number, row in enumerate(rows))
        return rows


class Shared(Model):
    """What all scenarios share; the tools are first, because the others name them."""

    system: str
    max_turns: int = Field(ge=1, le=100)
    tools: list[Tool]
    results: list[Result]
    always: Rules


@dataclass(frozen=True)
class Scenario:
    """What is said first, what the tools answer, and what is worth two points and one."""

    category: str
    name: str
    about: str
    messages: Sequence[Message]
    results: Sequence[Result]
    passes: Sequence[Rule]
    partial: Sequence[Rule]

    @property
    def key(self) -> str:
        return f"{self.category}/{self.name}"


@dataclass(frozen=True)
class Suite:
    """All scenarios, by category and in the order of the files; `files` are what they were read from."""

    system: str
    max_turns: int
    tools: Mapping[str, Tool]
    scenarios: Sequence[Scenario]
    files: Sequence[Path]


def load(folder: Path = FOLDER) -> Suite:
    """The suite in a folder. Raises UserError for what is wrong in it."""
    files = [folder / SUITE, *(folder / f"{category}.yaml" for category in CATEGORIES)]
    tools: dict[str, Tool] = {}
    shared = strict_yaml.read(files[0], Shared, tools)
    scenarios = []
    for category, path in zip(CATEGORIES, files[1:], strict=True):
        file = strict_yaml.read(path, Category, tools)
        if file.category != category:
            raise UserError(f"{path}: category: {file.category} is not {category}, as the file is called", HINT)
        for row in file.scenarios:
            results, passes = [*row.results, *shared.results], [*shared.always, *row.passes]
            messages = _messages(row.messages)
            scenarios.append(Scenario(category, row.id, row.about, messages, results, passes, row.partial))
    return Suite(shared.system, shared.max_turns, tools, scenarios, files)


def _messages(begun: Sequence[Said]) -> list[Message]:
    """The conversation's beginning in the API's form, with ids for the calls in it."""
    messages: list[Message] = []
    unanswered: list[str] = []
    turn = 0  # of the assistant, with calls
    for said in begun:
        message: Message = {"role": said.role, "content": said.content}
        if said.role == "tool":
            message |= {"tool_call_id": unanswered.pop(0), "content": text_of(said.content)}
        if said.tool_calls:
            message["tool_calls"] = []
            for call in said.tool_calls:
                unanswered.append(call_id(turn, len(unanswered)))
                function = {"name": call.name, "arguments": text_of(call.arguments)}
                message["tool_calls"].append({"id": unanswered[-1], "type": "function", "function": function})
            turn += 1
        messages.append(message)
    return messages


def call_id(turn: int, number: int) -> str:
    """Of the call in a turn, the same in every run: nine letters and digits, which every chat template takes."""
    return f"call{turn:03}{number:02}"


def text_of(answer: Any) -> str:
    """What a tool's answer is in a message."""
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def choose(keys: Sequence[str], limit: int | None, left_out: Sequence[str]) -> list[str]:
    """The keys that are run: without those left out by key or beginning, and of each group only the first `limit`.

    Raises UserError for a name that leaves nothing out, and when nothing is left.
    """
    for name in left_out:
        if not any(_within(key, name) for key in keys):
            groups = sorted({key.rpartition("/")[0] for key in keys})
            raise UserError(f"there is no {name} to leave out", f"choose from {', '.join(groups)}, or a part of one")
    chosen: dict[str, list[str]] = {}
    for key in keys:
        if not any(_within(key, name) for name in left_out):
            chosen.setdefault(key.rpartition("/")[0], []).append(key)
    found = [key for group in chosen.values() for key in group[:limit]]
    if not found:
        raise UserError("everything was left out", "leave out less")
    return found


def _within(key: str, name: str) -> bool:
    return key == name or key.startswith(name.rstrip("/") + "/")
