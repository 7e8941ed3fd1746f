"""What the Makefile says of itself: its targets in groups, and which variables of the command line each of them reads.

No list is kept by hand. A target reads the variables that its recipe names, directly or by way of other variables, and
those of the targets that it needs or calls. A line `## NAME=<form>: what it is` makes a variable one of the command
line; the form says which values it has: 1 is a switch, another number is a number, `a|b` is one of these. Standard
library only: make asks before any environment exists.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"
# Variables that are make's own.
STANDARD = re.compile(r"\.\w+|MAKE\w*|GNUMAKEFLAGS|MFLAGS|SHELL|CURDIR|VPATH|V|V4FORGE_GIVEN")
START = "Start here"
WIDTH = 80
READERS_SHOWN = 4
NUMBER = re.compile(r"-?\d+(\.\d+)?")
# A line of the Makefile, and where a text of it names a variable or calls a target.
DOCUMENTED = re.compile(r"## ([A-Z][A-Z_]*)=(.+?): (.+)")
GROUP = re.compile(r"##@ (.+?): (.+)")
DEFINED = re.compile(r"(export )?(\w+) :?=(.*)")
TARGET = re.compile(r"([a-z][a-z-]*):([^#=]*)## (.+)")
NAMED = re.compile(r"\$\((?:value |call \w+,)?(\w+)\b")
CALLED = re.compile(r"(?:\$\(MAKE\)|\btry) ([a-z][a-z-]*)")
# A command of make in a hint: its goals, and what it sets.
VALUE = r"""(?:"[^"]*"|'[^']*'|<[^>]*>|[^\s"'<])*?(?=[,.;:)]*(?:\s|$))"""
COMMAND = re.compile(rf"\bmake((?: [a-z][a-z-]*)+)((?: [A-Z_]+={VALUE})*)")
# What follows the word make where it is no command.
PROSE = ("a", "environments", "it", "leaves", "of", "sure", "that", "the", "them", "was")
# What a hint's command is another one without: of which artifact it is, where that is, and what runs it.
PLACES = ("PROFILE", "SCRATCH", "ARTIFACT", "RUNTIME", "BACKEND")
# Of a program's environment: what make was given, as words of a shell, and, where there is no Makefile, which target
# reads what of PLACES.
GIVEN, READS = "V4FORGE_GIVEN", "V4FORGE_READS"


@dataclass(frozen=True)
class Variable:
    """`form` stands for its values, such as 8 or host|docker; `default` is what the Makefile sets, unexpanded."""

    name: str
    form: str
    help: str
    default: str = ""

    @property
    def is_number(self) -> bool:
        return bool(NUMBER.fullmatch(self.form)) and self.form != "1"

    def fault(self, value: str) -> tuple[str, str] | None:
        """Why a value is none, and one that is; None where it may be one. What a program alone can say, it says."""
        if not value and not (self.is_number and self.default):
            return None
        given = f"{self.name}={value}"
        if self.form == "1" and value != "1":
            return f"{given} is not 1", f"{self.name}=1, or without it"
        if self.is_number and not (value.split() and all(map(NUMBER.fullmatch, value.split()))):
            return f"{given} is no number", f"{self.name}={self.form}"
        choices = self.form.split("|")
        if len(choices) > 1 and value not in choices:
            return f"{given} is none of {', '.join(choices)}", f"{self.name}={nearest(value, choices) or choices[0]}"
        return None


@dataclass(frozen=True)
class Target:
    name: str
    group: str
    needs: tuple[str, ...]
    help: str
    recipe: list[str] = field(default_factory=list)

    @property
    def short(self) -> str:
        """The help's first part."""
        return re.split(r"[;:] ", self.help)[0]


@dataclass(frozen=True)
class Makefile:
    """`definitions`: text of each variable, documented or not; `main`: a group's targets that `make help` shows."""

    variables: Mapping[str, Variable]
    definitions: Mapping[str, str]
    targets: Mapping[str, Target]
    main: Mapping[str, Sequence[str]]
    elsewhere: str  # what concerns every target: conditions, and what is exported

    def named(self, text: str) -> set[str]:
        """The variables that a text names, directly or by way of others."""
        found, pending = set[str](), [text]
        while pending:
            new = set(NAMED.findall(pending.pop())).intersection(self.definitions) - found
            found |= new
            pending += [self.definitions[name] for name in new]
        return found

    @cached_property
    def everywhere(self) -> set[str]:
        """The variables of the command line that every target reads."""
        return self.named(self.elsewhere).intersection(self.variables)

    def own(self, name: str) -> set[str]:
        """The variables of the command line that a target and those that it calls name."""
        found, pending, seen = set[str](), [name], set[str]()
        while pending:
            if (target := self.targets.get(pending.pop())) is None or target.name in seen:
                continue
            seen.add(target.name)
            recipe = "\n".join(target.recipe)
            found |= self.named(recipe)
            pending += CALLED.findall(recipe)
        return found.intersection(self.variables)

    def reads(self, name: str) -> set[str]:
        """The variables of the command line that a target reads, those that it needs and calls too."""
        found, pending, seen = set(self.everywhere), [name], set[str]()
        while pending:
            if (target := self.targets.get(pending.pop())) is None or target.name in seen:
                continue
            seen.add(target.name)
            found |= self.own(target.name)
            pending += target.needs
        return found


def read(path: Path = MAKEFILE) -> Makefile:
    """The Makefile in a file."""
    variables, definitions, targets = dict[str, Variable](), dict[str, str](), dict[str, Target]()
    main = dict[str, Sequence[str]]()
    elsewhere, recipe, group = list[str](), list[str](), ""
    documented: re.Match[str] | None = None
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("\t"):
            recipe.append(line)
        elif found := DOCUMENTED.fullmatch(line):
            documented = found
        elif found := GROUP.fullmatch(line):
            group = found[1]
            main[group] = found[2].split()
        elif found := TARGET.fullmatch(line):
            target = targets[found[1]] = Target(found[1], group, tuple(found[2].split()), found[3])
            recipe = target.recipe
        elif found := DEFINED.fullmatch(line):
            definitions[found[2]] = found[3].strip()
            if documented and documented[1] == found[2]:
                variables[found[2]] = Variable(documented[1], documented[2], documented[3], definitions[found[2]])
            elsewhere += [found[3]] if found[1] else []
        elif line.startswith("if"):
            elsewhere.append(line)
    return Makefile(variables, definitions, targets, main, "\n".join(elsewhere))


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of some words that another is likely to have meant."""
    from difflib import get_close_matches

    known = {each.lower(): each for each in words}
    return next((known[near] for near in get_close_matches(word.lower(), known, 1, 0.75)), None)


def fault(made: Makefile, goals: Sequence[str], given: Mapping[str, str]) -> tuple[str, str] | None:
    """The first thing that make was asked and does not know: a fact and a hint; None where there is none."""
    known = [name for name in goals if name in made.targets]
    for goal in goals:
        if goal not in made.targets and not goal.startswith("help"):
            near = nearest(goal, made.targets)
            return f"there is no target {goal}", f"make {near}" if near else "make help"
    read_here = set[str]().union(*(made.reads(goal) for goal in known))
    for name, value in given.items():
        if STANDARD.fullmatch(name):
            continue
        variable = made.variables.get(name)
        if variable is None:
            return _unknown(made, name, value, goals, read_here)
        if name not in read_here:
            command = f"make {' '.join(goals)}"
            return f"{command} does not read {name}", f"{command} without it; it is read by {_readers(made, name)}"
        if wrong := variable.fault(value):
            return wrong
    return None


def _unknown(made: Makefile, name: str, value: str, goals: Sequence[str], read_here: set[str]) -> tuple[str, str]:
    fact = f"no target reads {name}"
    if near := nearest(name, sorted(read_here)):
        return fact, f"{near}={shlex.quote(value)}"
    if near := nearest(name, made.variables):
        return fact, f"{near}={shlex.quote(value)}, which is read by {_readers(made, near)}, not {' '.join(goals)}"
    group = next((made.targets[goal].group for goal in goals if goal in made.targets and made.targets[goal].group), "")
    shown = f"make help-{group.lower()}" if group else "make help"
    return (
        fact,
        f"{shown} has the variables; one of the environment stands before make: {name}=… make {' '.join(goals)}",
    )


def _readers(made: Makefile, name: str) -> str:
    """Some targets that read a variable, those first that `make help` shows."""
    shown = [target for names in made.main.values() for target in names]
    found = [target for target in [*shown, *made.targets] if name in made.own(target)]
    return ", ".join(list(dict.fromkeys(found))[:READERS_SHOWN])


def overview(made: Makefile) -> list[str]:
    """`make help`: the main targets of each group, on a terminal of 80 x 24."""
    lines = ["make <target> [VARIABLE=value …]"]
    for group, names in made.main.items():
        for name in names:
            lines.append(f"{group if name == names[0] else '':<12}{name:<14}{made.targets[name].short}")
    groups = " ".join(f"help-{group.lower()}" for group in made.main if group != START)
    return [*lines, "", "All targets, and their variables:", f"  make {groups}"]


def group_help(made: Makefile, word: str) -> list[str]:
    """`make help-<group>`: all its targets with what they read, then what each variable is."""
    targets = [target for target in made.targets.values() if target.group.lower() == word]
    indent = " " * 17
    lines, named, first = [], set[str](), dict[str, str]()
    for target in targets:
        own = [name for name in made.variables if name in made.own(target.name)]
        named.update(own)
        told = " ".join(own)
        if first.setdefault(told, target.name) != target.name and len(own) > 1:
            told = f"as {first[told]}"
        lines += textwrap.wrap(f"{target.name:<17}{target.help}", WIDTH, subsequent_indent=indent)
        lines += textwrap.wrap(told, WIDTH, initial_indent=indent, subsequent_indent=indent)
    lines.append("")
    for name, variable in made.variables.items():
        if name in named | made.everywhere:
            start = f"{name}={variable.form}"
            lines += textwrap.wrap(f"{start:<25} {variable.help}", WIDTH, subsequent_indent=" " * 26)
    return lines


def parsed(words: Iterable[str]) -> dict[str, str]:
    """NAME=value, word by word."""
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def given() -> dict[str, str]:
    """The variables of the command line of the make that runs this program."""
    return parsed(shlex.split(os.environ.get(GIVEN, "")))


@cache
def places(told: str = "") -> Mapping[str, frozenset[str]]:
    """target -> what of PLACES it reads, by the Makefile, or by `told`, a value of READS."""
    if told:
        return {target: frozenset(names.split(",")) for target, names in parsed(told.split()).items()}
    if not MAKEFILE.is_file():
        return {}
    made = read()
    return {target: frozenset(made.reads(target).intersection(PLACES)) for target in made.targets}


def completed(hint: str, values: Mapping[str, str] | None = None) -> str:
    """The hint whose commands of make also say what was given of PLACES, where a goal of theirs reads it. `values` is
    what was given, if not to the make that runs this program."""
    values = given() if values is None else values
    known = {name: values[name] for name in PLACES if values.get(name)}
    if not known or "make " not in hint:
        return hint
    read_by = places(os.environ.get(READS, ""))

    def whole(found: re.Match[str]) -> str:
        words = found[1].split()
        goals = words[: next((at for at, word in enumerate(words) if word not in read_by), len(words))]
        if found[2] and goals != words:
            return found[0]
        wanted = frozenset[str]().union(*(read_by[goal] for goal in goals)) - set(re.findall(r" ([A-Z_]+)=", found[2]))
        more = [f"{name}={shlex.quote(value)}" for name, value in known.items() if name in wanted]
        return " ".join(["make", *goals, *found[2].split(" ")[1:], *more, *words[len(goals) :]])

    return COMMAND.sub(whole, hint)


def passed_on() -> dict[str, str]:
    """The variables with which a program that has no Makefile completes its hints all the same."""
    known = [f"{name}={value}" for name, value in given().items() if name in PLACES]
    if not known:
        return {}
    reads = [f"{target}={','.join(sorted(names))}" for target, names in places().items() if names]
    return {GIVEN: shlex.join(known), READS: " ".join(reads)}
