"""What the benches share: options, the server that they measure, the result file that they add to."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts import serve
from v4forge.bench import results, served_model
from v4forge.bench.results import Measurement
from v4forge.bench.served_model import Target
from v4forge.errors import UserError
from v4forge.serving import deployment

REQUEST_LIMIT_S = 600


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of every bench: where results go, what is measured, how it is served."""
    add = command.add_argument
    add("--reports", type=Path, default=Path("scratch/tiny/reports"), metavar="DIR", help="default: %(default)s")
    add("--limit", type=int, metavar="N", help="a trial with N of each kind of request, no result")
    add("--fresh", action="store_true", help="do not continue an interrupted run")
    add("--dry-run", action="store_true", help="say what would be measured and stop")
    add("--seed", type=int, default=42, metavar="N", help="default: %(default)s")
    add("--request-timeout", type=float, default=REQUEST_LIMIT_S, metavar="S",
        help="for one answer; default: %(default)s")  # fmt: skip
    add("--url", default="", metavar="URL", help="measure what is served there, http://127.0.0.1:8000 say")
    add("--folder", type=Path, default=Path("scratch/tiny/serve"), metavar="DIR",
        help="of a deployment of make serve, which is measured if it runs; default: %(default)s")  # fmt: skip
    serving = command.add_argument_group("how it is served, unless it is already (as make serve)")
    serve.add_plan(serving)
    serve.add_start(serving)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers that cannot be."""
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} leaves nothing to measure", "--limit 2, or leave it out")
    if arguments.request_timeout is not None and not arguments.request_timeout > 0:
        raise UserError(f"--request-timeout {arguments.request_timeout:g} waits for no answer", "leave it out")


def check_stopped(arguments: argparse.Namespace) -> None:
    """Raises UserError while a deployment runs in --folder, of whose GPUs a bench's own servers would take memory."""
    if deployment.load(arguments.folder):
        fact = f"this bench starts its own servers, and one runs already from {arguments.folder}"
        raise UserError(fact, "make serve-stop, then again; or measure that one: --url URL")


def programs(arguments: argparse.Namespace) -> Path | None:
    """The folder of vllm's and lm-eval's programs on this machine, None where they are in the serving image: as the
    deployment runs that is measured, unless the arguments say where."""
    running = deployment.load(arguments.folder)
    if running and not (arguments.runtime or arguments.program):
        return Path(running.program) if running.runtime == "host" else None
    if (arguments.runtime or ("docker" if arguments.backend == "cuda" else "host")) == "docker":
        return None
    return Path(os.path.abspath(arguments.program or serve.PROGRAMS[arguments.backend]))


@contextmanager
def served(arguments: argparse.Namespace, **more: Any) -> Iterator[Target]:
    """What is measured: what --url names, or else the deployment that runs in --folder, or else a deployment of the
    artifact, which lives as long as the block.

    more: options of scripts.serve that this bench decides, drafts=0 say. With any of them the bench always starts its
    own servers, and a running deployment is an error. Raises UserError where nothing can be measured.
    """
    if more:
        check_stopped(arguments)
    key = serve.read_key(arguments.api_key_file)
    running = deployment.load(arguments.folder)
    if arguments.url:
        yield served_model.look(arguments.url, key, arguments.folder, _given_artifact(arguments))
        return
    if running:
        yield served_model.look(running.url, key or running.key, arguments.folder)
        return
    options = argparse.Namespace(**{**vars(arguments), **more})
    options.folder = arguments.folder.with_name(f"{arguments.folder.name}-bench")
    if deployment.load(options.folder):  # of a bench that was killed
        serve.stop(options)
    if key:
        os.environ["API_KEY"] = key  # serve.up takes it away again
    options.api_key_file = ""
    serve.up(options)
    try:
        plan = deployment.load(options.folder)
        assert plan
        yield served_model.look(plan.url, key, options.folder)
    finally:
        serve.stop(options)


def _given_artifact(arguments: argparse.Namespace) -> Path | None:
    """--artifact where the user named one that is here: a server elsewhere may serve the same."""
    folder = Path(arguments.artifact)
    return folder if arguments.artifact != serve.ARTIFACT and (folder / "config.json").is_file() else None


def begin(
    arguments: argparse.Namespace,
    at: Target | Mapping[str, Any],
    settings: Mapping[str, Any],
    sampling: Mapping[str, Any],
    hashes: Mapping[str, str],
    versions: Mapping[str, Any] | None = None,
) -> Measurement:
    """The result file to add to. at: the target, or its facts; versions: of further programs that measure."""
    about = at.facts if isinstance(at, Target) else dict(at)
    facts = {
        "target": about,
        "machine": served_model.machine(),
        "versions": {**served_model.versions(about), **(versions or {})},
        "settings": dict(settings),
        "sampling": dict(sampling),
        "seed": arguments.seed,
        "hashes": dict(hashes),
    }
    opened = results.begin(
        arguments.reports, arguments.bench, facts, arguments.limit, arguments.fresh, arguments.command
    )
    if done := len(opened.content["parts"]):
        serve.say(f"{arguments.bench}: continuing {opened.path}, {done} parts are there")
    return opened


def conclude(opened: Measurement) -> int:
    """Ends a bench: the file, what failed; the exit code."""
    complete = opened.finish()
    for key, failure in opened.content["failures"].items():
        serve.say(f"not measured: {key}: {failure['fact']}\n  hint: {failure['hint']}")
    trial = opened.content["trial"]
    note = f", a trial of {trial}: no result" if trial is not None else ""
    serve.say(f"{opened.content['bench']}: {opened.path}{note}")
    return 0 if complete else 1


def command_line(words: Sequence[str]) -> str:
    """The command that measured, for people to repeat."""
    return shlex.join(["python", "-m", "scripts.bench", *words])
