"""What the benches share on the command line: where results go, what is measured, how it is served."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from v4forge.bench.results import BASELINE
from v4forge.bench.session import Session
from v4forge.errors import UserError
from v4forge.serving import keys, settings
from v4forge.serving.deployment import Deployment

from . import serve_options
from .cli import steps

REQUEST_LIMIT_S = 600


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of every bench."""
    add = command.add_argument
    add("--reports", type=Path, default=Path("scratch/tiny/reports"), metavar="DIR", help="default: %(default)s")
    add("--baseline", type=Path, metavar="DIR",
        help="then the same of this checkpoint, served alike; its results go to baseline/ in the reports")  # fmt: skip
    add("--limit", type=int, metavar="N", help="a trial with N of each kind of request, no result")
    add("--fresh", action="store_true", help="do not continue an interrupted run")
    add("--dry-run", action="store_true", help="say what would be measured and stop")
    add("--seed", type=int, default=42, metavar="N", help="default: %(default)s")
    add("--request-timeout", type=float, default=REQUEST_LIMIT_S, metavar="S",
        help="for one answer; default: %(default)s")  # fmt: skip
    add("--url", default="", metavar="URL", help="measure what is served there, http://127.0.0.1:8000 say")
    add("--model", default="", metavar="NAME", help="which is measured, where several are served")
    add("--folder", type=Path, default=serve_options.FOLDER, metavar="DIR",
        help="of a deployment of make serve, which is measured if it runs; default: %(default)s")  # fmt: skip
    serving = command.add_argument_group("how it is served, unless it is already (as make serve)")
    serve_options.add_wanted(serving, settings.PUBLISHED)
    serve_options.add_start(serving)


def check_baseline(arguments: argparse.Namespace) -> None:
    """Raises UserError where the baseline cannot be served after the artifact, before anything is measured."""
    if arguments.baseline is None:
        return
    if not (arguments.baseline / "config.json").is_file():
        fact = f"there is no checkpoint in {arguments.baseline}: no config.json"
        raise UserError(fact, f"make bench-{arguments.bench} BASELINE=<folder of a checkpoint>")
    if arguments.url:
        fact = "a baseline is served here, and --url says that something is served already"
        raise UserError(fact, "leave one of them out")
    if Deployment.load(arguments.folder):
        fact = f"a deployment runs from {arguments.folder}, and the baseline is served in its place"
        raise UserError(fact, "make serve-stop, then again")


def of_baseline(arguments: argparse.Namespace) -> argparse.Namespace:
    """What measures the baseline: the same, but for its folder and where results go. Nobody has certified it."""
    changed = {
        "artifact": str(arguments.baseline),
        "reports": arguments.reports / BASELINE,
        "allow": [*arguments.allow, "certificate"],
        "verify_key": None,
        "baseline": None,
    }
    return argparse.Namespace(**{**vars(arguments), **changed})


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers that cannot be."""
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} leaves nothing to measure", "--limit 2, or leave it out")
    if arguments.request_timeout is not None and not arguments.request_timeout > 0:
        raise UserError(f"--request-timeout {arguments.request_timeout:g} waits for no answer", "leave it out")


def session_of(arguments: argparse.Namespace) -> Session:
    """What the options ask for, with the key, which is read and leaves the environment here."""
    return Session(
        bench=arguments.bench,
        reports=arguments.reports,
        url=arguments.url,
        wanted=serve_options.wanted(arguments),
        start=serve_options.start(arguments),
        steps=steps,
        keys=keys.read(arguments.api_key_file),
        model=arguments.model,
        artifact=Path(arguments.artifact) if arguments.artifact != serve_options.ARTIFACT else None,
        limit=arguments.limit,
        fresh=arguments.fresh,
        seed=arguments.seed,
        command=arguments.command,
    )


def command_line(words: Sequence[str]) -> str:
    """The command that measured, for people to repeat."""
    return shlex.join(["python", "-m", "scripts.bench", *words])
