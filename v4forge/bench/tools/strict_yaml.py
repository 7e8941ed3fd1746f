"""YAML that people edit, read strictly: what is wrong is told with its file and line.

Plain words stay words: only true, false, null and decimal numbers mean something, so `14:15`, `no` and `2027-03-17` are
strings. A key that comes twice, and a key that nobody reads, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from v4forge.errors import UserError

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a table"}
HINT = "correct the file; an unchanged checkout has none of these"


class Fault(Exception):
    """What is wrong, and in which line of the file."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line, self.what = line, what


class Table(dict[str, Any]):
    """A mapping that knows its first line and the line of each key."""

    line: int
    lines: dict[str, int]

    def fault(self, field: str, what: str) -> Fault:
        return Fault(self.lines.get(field, self.line), f"{field}: {what}")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for tag, pattern, first in (
    ("null", r"^(?:null)$", "n"),
    ("bool", r"^(?:true|false)$", "tf"),
    ("int", r"^-?(?:0|[1-9][0-9]*)$", "-0123456789"),
    ("float", r"^-?(?:0|[1-9][0-9]*)\.[0-9]+$", "-0123456789"),
    ("merge", r"^(?:<<)$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))


def _table(loader: _Loader, node: yaml.MappingNode) -> Table:
    table = Table()
    table.line, table.lines = node.start_mark.line + 1, {}
    for key_node, value_node in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise Fault(line, f"the key {key!r} is not text")
        if key in table:
            raise Fault(line, f"{key}: is there twice")
        table[key], table.lines[key] = loader.construct_object(value_node, deep=True), line
    return table


_Loader.add_constructor("tag:yaml.org,2002:map", _table)


def load(path: Path) -> Table:
    """The table in a file. Raises UserError when it cannot be read or is something else."""
    try:
        with path.open(encoding="utf-8") as file:
            value = yaml.load(file, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", HINT) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: {error.problem}", HINT) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}", HINT) from None
    except Fault as fault:
        raise told(path, fault) from None
    if not isinstance(value, Table):
        raise UserError(f"{path} holds no table", HINT)
    return value


def told(path: Path, fault: Fault, where: str = "") -> UserError:
    """The error that names the file, the line, and what it is about."""
    return UserError(f"{path}:{fault.line}: {where}{': ' if where else ''}{fault.what}", HINT)


def checked(table: Table, required: Mapping[str, type], optional: Mapping[str, type] | None = None) -> Table:
    """The table, if each key is known, of its type, and all that are required are there. A float may be whole.

    Raises Fault.
    """
    known = {**required, **(optional or {})}
    for field in table:
        if field not in known:
            raise table.fault(field, f"is not known here; known: {', '.join(known)}")
    for field in required:
        if field not in table:
            raise Fault(table.line, f"{field}: is missing")
    for field, value in table.items():
        if not _is(value, known[field]):
            raise table.fault(field, f"{value!r} is not {KINDS[known[field]]}")
    return table


def _is(value: Any, kind: type) -> bool:
    if kind is object:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def only_true(table: Table, field: str) -> None:
    """Of a table whose one field is a switch that is left out when it is off. Raises Fault for anything but true."""
    if not checked(table, {field: bool})[field]:
        raise table.fault(field, "can only be true")


def rows(table: Table, field: str, kind: type = dict) -> list[Any]:
    """The list in a field, all of one type. Raises Fault."""
    for row in table[field]:
        if not _is(row, kind):
            raise table.fault(field, f"{row!r} is not {KINDS[kind]}")
    return list(table[field])
