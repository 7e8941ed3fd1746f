"""Measures a served model: one program for each question, raw results with their provenance in a folder of reports.

python -m scripts.bench speed   --artifact DIR     time a token and tokens a second, with drafts and without
python -m scripts.bench draft   --artifact DIR     how many drafts are accepted, by kind of text
python -m scripts.bench quality --artifact DIR     lm-eval's tasks, against the published figures
python -m scripts.bench tools   --artifact DIR     tool calls and short conversations with known outcomes

Each serves the artifact by itself and stops it in the end. What is served already is measured as it is: what --url
names, with speed comparing nothing then, or else, but not by speed, the deployment in --folder. A run that was
interrupted goes on where it stopped: the same command again. --limit N is a short trial, --dry-run says what it takes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from scripts import benching
from scripts.cli import parser_for
from v4forge.errors import run_main

BENCHES = ("speed", "draft", "quality", "tools")


def module_of(bench: str) -> ModuleType:
    """scripts/bench_<bench>.py: its add_arguments(parser) and run(args), which returns the exit code."""
    return importlib.import_module(f"scripts.bench_{bench}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for("bench", __doc__)
    commands = parser.add_subparsers(required=True, metavar="|".join(BENCHES), dest="bench")
    for bench in BENCHES:
        module = module_of(bench)
        about = (module.__doc__ or "").split("\n\n")[0]
        command = commands.add_parser(
            bench,
            help=about,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve",  # a bench may mean something else by a shared option
        )
        benching.add_arguments(command)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    arguments.command = benching.command_line(sys.argv[1:] if argv is None else argv)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    code: int = arguments.run(arguments)
    return code


if __name__ == "__main__":
    run_main(main)
