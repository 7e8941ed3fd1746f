"""The programs of v4forge under one name; each has its own --help.

`v4forge verify …` of an installed package is `python -m scripts.verify …` in a checkout. Only the program that is named
is imported, and what it needs besides once it works.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from v4forge import checkout, pins
from v4forge.errors import UserError, run_main

NAME = "v4forge"
# What pip does not call a package as its module is imported.
DISTRIBUTIONS = {"yaml": "pyyaml", "pynvml": "nvidia-ml-py", "cyclonedx": "cyclonedx-python-lib"}


@dataclass(frozen=True)
class Program:
    """A program of this package by its module; `words` go before those of the command line. checkout: it builds,
    serves or runs what only a checkout of the project has. says: what it does with these words."""

    module: str
    words: Sequence[str] = ()
    checkout: bool = False
    says: str = ""

    @property
    def summary(self) -> str:
        """What it does: the first sentence of its docstring, which is read without importing it."""
        if self.says:
            return self.says
        source = Path(__file__).with_name(f"{self.module}.py").read_text(encoding="utf-8")
        paragraph = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
        return " ".join(paragraph.split()).partition("; ")[0].partition(". ")[0].rstrip(".")


PROGRAMS = {
    "inspect": Program("inspect_checkpoint"),
    "plan": Program("plan"),
    "fetch": Program("fetch"),
    "dequant": Program("dequant"),
    "calibrate": Program("calibrate"),
    "postprocess": Program("postprocess"),
    "verify": Program("verify"),
    "certified": Program("certified"),
    "card": Program("card"),
    "report": Program("report"),
    "compare": Program("compare"),
    "publish": Program("publish"),
    "serve-print": Program(
        "serve", ["print"], says="Prints the settings of vLLM with their reasons, and the exact commands"
    ),
    "chat": Program("chat"),
    "serve": Program("serve", checkout=True),
    "bench": Program("bench", checkout=True),
    "stage": Program("stage", checkout=True),
    "status": Program("status", checkout=True),
    "doctor": Program("doctor", checkout=True),
    "replay": Program("replay", checkout=True),
    "release-check": Program("release_check", checkout=True),
    "image": Program("image", checkout=True),
    "reproduce": Program("reproduce", checkout=True),
    "patch": Program("patch", checkout=True),
    "env": Program("env", checkout=True),
    "goals": Program("goals", checkout=True),
}


def run(name: str, program: Program) -> int | None:
    """Runs a program on the words of sys.argv -> its exit code. Raises UserError where what it needs is not here."""
    if program.checkout and checkout.INSTALLED:
        url = pins.read()["PROJECT_URL"]
        raise UserError(f"{name} needs a checkout of v4forge, and this is an installed package", f"git clone {url}")
    try:
        main: Callable[[], int | None] = importlib.import_module(f".{program.module}", __package__).main
        return main()
    except ModuleNotFoundError as missing:
        root = (missing.name or "").partition(".")[0]
        if root in ("", NAME, __package__):
            raise
        raise UserError(f"{name} needs {root}, which is not installed", installation(root)) from missing


def installation(module: str) -> str:
    """The command that brings a module: that of the group of pyproject.toml that lists it."""
    if not checkout.INSTALLED:
        return "make env"
    wanted = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    for requirement in metadata.requires(NAME) or []:
        group = re.fullmatch(rf"{re.escape(wanted)}\b.*extra == ['\"](\w+)['\"]", requirement)
        if group:
            return f"pip install '{NAME}[{group[1]}]'"
    return f"pip install --force-reinstall {NAME}"


def version() -> str:
    """Of an installed package its version, else the commit that is checked out."""
    if checkout.INSTALLED:
        return f"{NAME} {metadata.version(NAME)}"
    return f"{NAME}, a checkout at {checkout.revision() or 'no commit'}"


def parse(words: Sequence[str]) -> None:
    """Answers what names no program: --help, --version, or what is wrong."""
    parser = argparse.ArgumentParser(
        prog=NAME, description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="store_true", help="the version, or the commit of a checkout")
    for title, of_checkout in (("programs", False), ("programs of a checkout", True)):
        group = parser.add_argument_group(title)
        for name, program in PROGRAMS.items():
            if program.checkout == of_checkout:
                group.add_argument(name, nargs="?", help=program.summary, metavar=name)
    parser.usage = f"{NAME} [-h] [--version] <program> …"
    if words and not words[0].startswith("-"):
        parser.error(f"there is no program {words[0]!r}; there are: {', '.join(PROGRAMS)}")
    if parser.parse_args(words).version:
        print(version())
    else:
        parser.print_help()


def main() -> None:
    words = sys.argv[1:]
    if words and words[0] in PROGRAMS:
        program = PROGRAMS[words[0]]
        sys.argv = [sys.argv[0], *program.words, *words[1:]]
        run_main(partial(run, words[0], program))
    run_main(partial(parse, words))


if __name__ == "__main__":
    main()
