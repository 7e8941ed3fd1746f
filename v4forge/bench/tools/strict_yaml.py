"""YAML that people edit, read strictly into pydantic's models: what is wrong is told with file, line and field.

Plain words stay words: only true, false, null and decimal numbers mean something, so `14:15`, `no` and `2027-03-17` are
strings. A key that comes twice, and a key that nobody reads, are errors.

The loader is ours: PyYAML's takes `no` for false, `14:15` for 855 and `007` for 7, keeps the last of two equal keys,
and forgets where they stood. So is what an unknown field is told with: pydantic does not say which ones are known.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from v4forge.errors import UserError

HINT = "correct the file; an unchanged checkout has none of these"
# How a kind of pydantic's errors is told; what is not here, in pydantic's words.
SAID = {
    "missing": "is missing",
    "too_short": "holds none",
    "string_type": "Input is not text",
    "int_type": "Input is not a whole number",
    "float_type": "Input is not a number",
    "bool_type": "Input is not true or false",
    "list_type": "Input is not a list",
    "dict_type": "Input is not a table",
    "model_type": "Input is not a table",
}
Place = tuple[str | int, ...]  # keys and numbers, as in pydantic's `loc`


class Table(dict[str, Any]):
    """A mapping that knows its first line and the line of each key."""

    line: int
    lines: dict[str, int]


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
        key, mark = loader.construct_object(key_node, deep=True), key_node.start_mark
        if not isinstance(key, str):
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} is not text", problem_mark=mark)
        if key in table:
            raise yaml.MarkedYAMLError(problem=f"{key}: is there twice", problem_mark=mark)
        table[key], table.lines[key] = loader.construct_object(value_node, deep=True), mark.line + 1
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
    if not isinstance(value, Table):
        raise UserError(f"{path} holds no table", HINT)
    return value


class Model(BaseModel):
    """A table of a file: its fields and no others, each of its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    @model_validator(mode="wrap")
    @classmethod
    def _tells_what_is_known(cls, table: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """An unknown field, likely a misspelt one, is the one fault that is told of its table."""
        try:
            return handler(table)
        except ValidationError as error:
            for place in (each["loc"] for each in error.errors() if each["type"] == "extra_forbidden"):
                if len(place) == 1:
                    known = ", ".join(field.alias or name for name, field in cls.model_fields.items())
                    raise fault(f"is not known here; known: {known}", *place) from None
            raise


class Described(Model):
    """A model that is told as a line: `said`, with its fields in it."""

    said: ClassVar[str]

    def __str__(self) -> str:
        return self.said.format(**dict(self))


AnyModel = TypeVar("AnyModel", bound=Model)


def read(path: Path, model: type[AnyModel], context: Any = None) -> AnyModel:
    """The model of a file. context: what its validators know besides. Raises UserError, with a line for each fault."""
    table = load(path)
    try:
        return model.model_validate(table, context=context)
    except ValidationError as error:
        told = sorted(_told(table, each) for each in error.errors())
        raise UserError("\n".join(f"{path}:{line}: {what}" for line, what in told), HINT) from None


def _told(table: Table, error: ErrorDetails) -> tuple[int, str]:
    """Of a fault: its line; the `id` of what it is in, its field, what is wrong."""
    said = SAID.get(error["type"], error["msg"])
    if said.startswith("Input "):
        said = said.replace("Input", repr(error["input"]), 1)
    value: Any = table
    line, row, field = table.line, "", ""
    for step in error["loc"]:
        field = step if isinstance(step, str) else field
        if isinstance(value, Table) and step not in value:
            line = value.line
            break
        line = value.lines[str(step)] if isinstance(value, Table) else line
        value = value[step]
        if isinstance(step, int) and isinstance(value, Table):
            line, row = value.line, row or str(value.get("id", ""))
    return line, ": ".join(filter(None, [row, field, said]))


def fault(what: str, *place: str | int) -> ValidationError:
    """What a validator raises: what is wrong, and where below the value that it was given."""
    error = PydanticCustomError("fault", "{what}", {"what": what})
    return ValidationError.from_exception_data("fault", [InitErrorDetails(type=error, loc=place, input=None)])


def each_once(names: Iterable[tuple[Place, str]]) -> None:
    """Raises a fault where a name comes again."""
    seen = set()
    for place, name in names:
        if name in seen:
            raise fault(f"{name} is there twice", *place)
        seen.add(name)


def kind_of(table: Any, kinds: Sequence[type[AnyModel]], what: str, context: Any = None) -> AnyModel:
    """The model of a table that may be one of several kinds. A kind is named by its first field."""
    if not isinstance(table, dict):
        raise fault(f"{table!r} is not a table")
    named = {next(iter(kind.model_fields)): kind for kind in kinds}
    name = next((key for key in table if key in named), None)
    if name is None:
        raise fault(f"no {what}; known: {', '.join(named)}", *list(table)[:1])
    return named[name].model_validate(table, context=context)


def _true(value: bool) -> bool:
    if not value:
        raise fault("can only be true")
    return value


# A switch that is left out when it is off.
OnlyTrue = Annotated[bool, AfterValidator(_true)]
