"""The tool-calling scenarios, bench/data/tools/*.yaml: the same tools for all, mocked answers, rules that score.

suite.yaml says what all share; each other file is a category. Every fault is told with file, line and scenario.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema

from v4forge.bench.tools import strict_yaml, value_matchers
from v4forge.bench.tools.call_assertions import Rule, known, rules
from v4forge.bench.tools.strict_yaml import Fault, Table, checked, rows, told
from v4forge.bench.tools.value_matchers import Matcher
from v4forge.errors import UserError

FOLDER = Path(__file__).parents[1] / "data" / "tools"
SUITE = "suite.yaml"
CATEGORIES = ("selection", "precision", "chains", "restraint", "recovery")
EACH = 3  # scenarios a category
Message = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """changes: whether a call that succeeds changes something."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    changes: bool = False

    def json(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    def fault(self, arguments: Mapping[str, Any]) -> str:
        """What the arguments do not keep of the schema, "" when they keep it; unknown ones are a fault too."""
        schema = {**self.parameters, "additionalProperties": False}
        error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(arguments))
        if error is None:
            return ""
        return f"{'.'.join(map(str, error.absolute_path)) or 'arguments'}: {error.message}"


@dataclass(frozen=True)
class Result:
    """What a tool answers to calls whose arguments fit: in order, the last one again and again."""

    tool: str
    where: Mapping[str, Matcher]
    answers: Sequence[Any]

    def fits(self, tool: str, arguments: Mapping[str, Any]) -> bool:
        return tool == self.tool and not value_matchers.missing(self.where, arguments)


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
    shared_file = folder / SUITE
    shared = strict_yaml.load(shared_file)
    with faults_of(shared_file):
        checked(shared, {"system": str, "max_turns": int, "tools": list, "results": list, "always": list})
        if not 1 <= shared["max_turns"] <= 100:
            raise shared.fault("max_turns", "has to be from 1 to 100")
        tools = {}
        for row in rows(shared, "tools"):
            tool = _tool(row)
            if tool.name in tools:
                raise row.fault("name", f"{tool.name} is there twice")
            tools[tool.name] = tool
        results = [_result(row, tools) for row in rows(shared, "results")]
        always = rules(shared, "always", list(tools))
    scenarios: list[Scenario] = []
    paths = [folder / f"{category}.yaml" for category in CATEGORIES]
    for category, path in zip(CATEGORIES, paths, strict=True):
        scenarios += _category(path, category, tools, results, always)
    return Suite(shared["system"], shared["max_turns"], tools, scenarios, [shared_file, *paths])


@contextmanager
def faults_of(path: Path, where: str = "") -> Iterator[None]:
    """Around what reads a part of a file: its faults become errors that name the place."""
    try:
        yield
    except Fault as fault:
        raise told(path, fault, where) from None


def _category(
    path: Path, category: str, tools: Mapping[str, Tool], results: Sequence[Result], always: Sequence[Rule]
) -> list[Scenario]:
    table = strict_yaml.load(path)
    with faults_of(path):
        checked(table, {"category": str, "scenarios": list})
        if table["category"] != category:
            raise table.fault("category", f"{table['category']} is not {category}, as the file is called")
        listed = rows(table, "scenarios")
        if len(listed) != EACH:
            raise table.fault("scenarios", f"{len(listed)}, not {EACH}: the score is of {2 * EACH} points a category")
    found: list[Scenario] = []
    for number, row in enumerate(listed, start=1):
        name = row.get("id", f"scenario {number}")
        with faults_of(path, str(name)):
            fields = {"id": str, "about": str, "messages": list, "pass": list, "partial": list}
            checked(row, fields, {"results": list})
            if name in [each.name for each in found]:
                raise row.fault("id", f"{name} is there twice")
            own = [_result(each, tools) for each in rows(row, "results")] if "results" in row else []
            passes = [*always, *rules(row, "pass", list(tools))]
            partial = rules(row, "partial", list(tools))
            messages = _messages(row, tools)
        found.append(Scenario(category, name, row["about"], messages, [*own, *results], passes, partial))
    return found


def _tool(row: Table) -> Tool:
    checked(row, {"name": str, "description": str, "parameters": dict}, {"changes": bool})
    try:
        jsonschema.Draft202012Validator.check_schema(row["parameters"])
    except jsonschema.SchemaError as error:
        raise row.fault("parameters", f"is no JSON schema: {error.message}") from None
    if row["parameters"].get("type") != "object":
        raise row.fault("parameters", "type: has to be object")
    return Tool(row["name"], row["description"], row["parameters"], row.get("changes", False))


def _result(row: Table, tools: Mapping[str, Tool]) -> Result:
    checked(row, {"tool": str, "answers": list}, {"where": dict})
    known(row, "tool", [row["tool"]], list(tools))
    where = row.get("where", Table())
    for name in where:
        if name not in tools[row["tool"]].parameters.get("properties", {}):
            raise where.fault(name, f"is no argument of {row['tool']}")
    if not row["answers"]:
        raise row.fault("answers", "holds none")
    return Result(row["tool"], value_matchers.matchers(where), row["answers"])


def _messages(scenario: Table, tools: Mapping[str, Tool]) -> list[Message]:
    """The conversation's beginning in the API's form, with ids for the calls in it."""
    messages: list[Message] = []
    open_calls: list[str] = []
    for row in rows(scenario, "messages"):
        checked(row, {"role": str, "content": object}, {"tool_calls": list})
        role, content = row["role"], row["content"]
        if role not in ("user", "assistant", "tool"):
            raise row.fault("role", f"{role} is not user, assistant or tool")
        message: Message = {"role": role, "content": content}
        if role == "tool":
            if not open_calls:
                raise row.fault("role", "no call before it is without an answer")
            message |= {"tool_call_id": open_calls.pop(0), "content": text_of(content)}
        elif not isinstance(content, str):
            raise row.fault("content", f"{content!r} is not text")
        if "tool_calls" in row:
            if role != "assistant":
                raise row.fault("tool_calls", "only the assistant calls tools")
            for call in rows(row, "tool_calls"):
                checked(call, {"name": str, "arguments": dict})
                known(call, "name", [call["name"]], list(tools))
                if fault := tools[call["name"]].fault(call["arguments"]):
                    raise call.fault("arguments", fault)
                open_calls.append(call_id(len([each for each in messages if "tool_calls" in each]), len(open_calls)))
                function = {"name": call["name"], "arguments": text_of(call["arguments"])}
                listed = message.setdefault("tool_calls", [])
                listed.append({"id": open_calls[-1], "type": "function", "function": function})
        messages.append(message)
    if not messages or messages[-1]["role"] != "user" or open_calls:
        raise scenario.fault("messages", "have to end with the user's, every call before it answered")
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
