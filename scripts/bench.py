"""Measures a served model: one program for each question, raw results with their provenance in a folder of reports.

python -m scripts.bench speed   --artifact DIR     TTFT, TPOT, throughput and goodput, with drafts and without
python -m scripts.bench draft   --artifact DIR     acceptance rate and length of drafts, by kind of text
python -m scripts.bench quality --artifact DIR     lm-eval's tasks, against the published figures
python -m scripts.bench tools   --artifact DIR     tool calls and short conversations with known outcomes

Each serves the artifact by itself and stops it in the end. What is served already is measured as it is: what --url
names, with speed comparing nothing then, or else, but not by speed, the deployment in --folder. A run that was
interrupted goes on where it stopped: the same command again. --limit N is a short trial, --dry-run says what it takes.
--baseline DIR measures another checkpoint after it, served alike, for the report to set beside it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from v4forge.errors import run_main

from .cli import parser_for

BENCHES = ("speed", "draft", "quality", "tools")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; `run` of them is the bench's run(args), which returns the exit code.

    Only the bench that is named is imported, scripts/bench_<bench>.py, which adds its options: one needs torch, one
    pydantic, and --help none of them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = parser_for("bench", __doc__)
    commands = parser.add_subparsers(required=True, metavar="|".join(BENCHES), dest="bench")
    for bench in BENCHES:
        doc = _doc(bench)
        command = commands.add_parser(
            bench,
            help=doc.split("\n\n")[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            conflict_handler="resolve",  # a bench may mean something else by a shared option
        )
        if bench in words[:1]:
            from . import benching

            module = importlib.import_module(f".bench_{bench}", __package__)
            benching.add_arguments(command)
            module.add_arguments(command)
            command.set_defaults(run=module.run, command=benching.command_line(words))
    return parser.parse_args(words)


def _doc(bench: str) -> str:
    """The docstring of a bench's module, which is not imported for it."""
    source = Path(__file__).with_name(f"bench_{bench}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source), clean=False) or ""


def main(argv: Sequence[str] | None = None) -> int:
    from . import benching

    arguments = parse(argv)
    benching.check_baseline(arguments)
    code: int = arguments.run(arguments)
    if arguments.baseline:
        print(f"{arguments.bench}: baseline {arguments.baseline}", flush=True)
        code = max(code, arguments.run(benching.of_baseline(arguments)))
    return code


if __name__ == "__main__":
    run_main(main)
