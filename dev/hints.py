"""Whether the commands that a text names are there, and would be understood: a hint's, a message's, a docstring's.

Nothing is run. The Makefile judges commands of make, each program's own parser those of `python -m scripts.…`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from unittest import mock

from scripts.__main__ import PROGRAMS
from v4forge import makefile

MADE = makefile.read()
# What stands for a value that is known when the text is told, in a text of the source.
UNKNOWN = "‹›"
WORD = r"""(?:"[^"]*"|'[^']*'|<[^>]*>|[^\s"'<`,;()]|[,;](?=\S))+"""
COMMAND = re.compile(rf"(?:\bmake|python -m scripts\.[\w‹›]+|(?<![\w/.-])v4forge)(?: (?!&& ){WORD})*")
VARIABLE = re.compile(r"([A-Z][A-Z_]*|‹›)=(.*)", re.DOTALL)
OPEN = re.compile(r"<.*?>|‹›|…")
GOAL = re.compile(r"[a-z‹][a-z›-]*")


def faults(text: str) -> list[str]:
    """What is wrong with the commands of a text, one line each."""
    found = []
    for command in COMMAND.finditer(text):
        words = command[0].split(" ")
        if words[0] == "make":
            fault = _of_make(_words(command[0])[1:])
        elif words[0] == "v4forge":
            fault = _of_package(_words(command[0])[1:])
        else:
            fault = _of_program(words[2].removeprefix("scripts."), _words(command[0])[3:])
        found += [f"{command[0]}: {fault}"] if fault else []
    return found


def _words(command: str) -> list[str]:
    """A command's words, without the dot or colon that ends a sentence."""
    return [re.sub(r"[\"'‘’]", "", word).rstrip(".:") or word for word in re.findall(WORD, command)]


def _of_make(words: Sequence[str]) -> str:
    if not words or words[0] in makefile.PROSE or not (GOAL.fullmatch(words[0]) or words[0] == "…"):
        return ""
    goals = set[str]()
    for at, word in enumerate(words):
        known = _goals(word)
        if not known and at == 0:
            return f"there is no target {word}"
        if not known:
            break
        goals |= known
    read = set().union(*(MADE.reads(goal) for goal in goals))
    for word in words[at:]:
        if not (setting := VARIABLE.fullmatch(word)):
            continue
        name, value = setting.groups()
        if name == UNKNOWN:
            continue
        if name not in read:
            return f"make {' '.join(sorted(goals)[:3])} does not read {name}"
        if not OPEN.search(value) and (wrong := MADE.variables[name].fault(value)):
            return wrong[0]
    return ""


def _goals(word: str) -> set[str]:
    """The targets that a word may stand for."""
    if word == "…":
        return set(MADE.targets)
    pattern = re.escape(word).replace(UNKNOWN, ".*") if GOAL.fullmatch(word) else ""
    helps = {word} if re.fullmatch(r"help(-\w+|-‹›)?", word) else set[str]()
    return {name for name in MADE.targets if pattern and re.fullmatch(pattern, name)} | helps


def _of_package(words: Sequence[str]) -> str:
    """Of the command v4forge; where its name is that of the project, no program follows it."""
    if not words or words[0] not in PROGRAMS:
        return ""
    program = PROGRAMS[words[0]]
    return _of_program(program.module, [*program.words, *words[1:]])


def _of_program(module: str, words: Sequence[str]) -> str:
    if OPEN.search(module):
        return ""
    if not (Path(__file__).parents[1] / "scripts" / f"{module}.py").is_file():
        return f"there is no program scripts.{module}"
    if not words:
        return ""
    parser = _parser(module, words[0])
    known = _options(parser)
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in known:
            return f"{module} has no option {word}"
    if "…" in words or UNKNOWN in words:
        return ""
    filled = [OPEN.sub("1", word) for word in words]
    last = max((at for at, word in enumerate(filled) if word.startswith("--")), default=0)
    # Words of the sentence may follow those of the command.
    said = [_parsed(parser, filled[:end]) for end in range(len(filled), last, -1)]
    return said[0] if all(said) else ""


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """What the parser has against these words."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            parser.parse_args(words)
    except SystemExit as end:
        return said.getvalue().partition("\n")[0] if end.code else ""
    return ""


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of those below it."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*(_options(each) for each in action.choices.values()))
    return found


class _Caught(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@cache
def _parser(module: str, first: str) -> argparse.ArgumentParser:
    """The parser that a program makes when its first word is this one."""

    def caught(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Caught(parser)

    main: Callable[[], object] = importlib.import_module(f"scripts.{module}").main
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", caught),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", caught),
        mock.patch.object(sys, "argv", [module, first]),
    ):
        try:
            main()
        except _Caught as found:
            return found.parser
    raise AssertionError(f"scripts.{module} has no parser")


def texts(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of what a module of Python may say: its strings, with what is filled in as UNKNOWN. Of a docstring
    what stands between backticks."""
    if not re.search(r"make |scripts\.|v4forge ", source):
        return
    nodes = list(ast.walk(ast.parse(source)))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    docs = {
        id(node.body[0].value)
        for node in nodes
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else UNKNOWN for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            quoted = [f"{each} …" for each in re.findall(r"`([^`]+)`", node.value)]  # perhaps less than all of it
            said = quoted if id(node) in docs else [node.value]
            yield from ((node.lineno, each) for each in said)
