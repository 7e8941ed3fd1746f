"""Serves an artifact: replicas of vLLM behind one OpenAI-compatible endpoint, speculation on; the Makefile calls it.

python -m scripts.serve print  --artifact scratch/flash/artifact --folder scratch/flash/serve     (or --print)
python -m scripts.serve up     --artifact scratch/flash/artifact --folder scratch/flash/serve
python -m scripts.serve status --folder scratch/flash/serve
python -m scripts.serve logs   --folder scratch/flash/serve
python -m scripts.serve reload --folder scratch/flash/serve --api-key-file keys.txt
python -m scripts.serve stop   --folder scratch/flash/serve

up returns when every replica is ready and a probe of each has passed; with another artifact, image or setting what runs
becomes that replica by replica. API keys come from the variable API_KEY or a
file, never from the command line.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from v4forge import checkout, gpus
from v4forge.errors import Parser, UserError, run_main
from v4forge.serving import keys, launch, settings, status
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import ROUTER, Deployment

from . import serve_options
from .cli import parser_for, steps


def show(deployment: Deployment) -> None:
    """The settings with their reasons, then the exact command of each replica and of the router."""
    chosen = deployment.serving
    print(f"{chosen.profile}: {settings.profiles()[chosen.profile]}\n")
    rows = [(" ".join(row.words()), f"{row.why} ({row.source})") for row in chosen.settings.values() if row.words()]
    for words, reason in rows:
        print(f"  {words}\n      {reason}")
    runtime = launch.runtime_of(deployment)
    print()
    for number, name in enumerate(deployment.names):
        where = {"CUDA_VISIBLE_DEVICES": ",".join(deployment.gpus[number])} if deployment.gpus[number] else {}
        shown = [f"{key}={shlex.quote(value)}" for key, value in (where | deployment.variables(number)).items()]
        print(f"{name}:\n  {' '.join(shown)} \\\n  vllm serve {shlex.join(deployment.arguments(number))}\n")
    if isinstance(runtime, Compose) and not checkout.INSTALLED:  # compose.yaml is a checkout's
        shown = [f"{key}={shlex.quote(value)}" for key, value in runtime.variables().items()]
        print(f"all of it:\n  {' '.join(shown)} \\\n  {shlex.join(runtime.command('up', '--detach'))}\n")
    print(f"router: {deployment.url}, and for this machine only {deployment.admin_url}")


def up(arguments: argparse.Namespace) -> None:
    """Starts what is asked for, waits until it is ready and has passed the probe; what runs already becomes it replica
    by replica, and is as before where one fails."""
    text = keys.read(arguments.api_key_file)
    deployment = launch.deployment_of(serve_options.wanted(arguments))
    launch.up(deployment, text, serve_options.start(arguments), steps)


def show_status(arguments: argparse.Namespace) -> int:
    """What runs: state, model, uptime, queue, tok/s, draft acceptance, KV cache. Exit code 1 if one is not ready."""
    runtime = launch.running_in(arguments.folder)
    rows = status.rows(runtime.deployment, runtime.processes())
    if arguments.json:
        print(json.dumps([row.json() for row in rows], indent=1))
    else:
        table = Table(box=None)
        columns = ("", "state", "up", "running", "waiting", "tok/s", "acceptance rate", "KV cache")
        for place, column in enumerate(columns):
            table.add_column(column, justify="left" if place < 2 else "right")
        for row in rows:
            numbers = (
                duration(row.uptime_s),
                number(row.running, "{:.0f}"),
                number(row.waiting, "{:.0f}"),
                number(row.tokens_per_s, "{:.1f}"),
                number(row.acceptance, "{:.1%}"),
                number(row.kv_usage, "{:.1%}"),
            )
            table.add_row(row.name, row.state, *numbers)
        Console().print(table)
        deployment = runtime.deployment
        models = ", ".join(sorted({row.model for row in rows if row.model})) or deployment.serving.model
        print(f"{models} at {deployment.url}, k={deployment.serving.drafts}, profile {deployment.profile}")
    return 0 if all(row.state == "ready" for row in rows) else 1


def number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def logs(arguments: argparse.Namespace) -> NoReturn:
    """Follows the logs of the replicas and the router, or of those named."""
    runtime = launch.running_in(arguments.folder)
    known = [*runtime.deployment.names, ROUTER]
    if unknown := [name for name in arguments.names if name not in known]:
        raise UserError(f"there is no {unknown[0]}", f"choose from: {', '.join(known)}")
    runtime.follow(arguments.names, arguments.lines)
    raise AssertionError("follow() has replaced this program")


def reload(arguments: argparse.Namespace) -> None:
    """Gives what runs the keys of a file, and its certificate as its files are now, without a restart."""
    launch.reload(arguments.folder, keys.read(arguments.api_key_file))


def stop(arguments: argparse.Namespace) -> None:
    """Takes no new request, waits for those that run, stops everything."""
    launch.stop(arguments.folder)


def pairs(arguments: argparse.Namespace) -> None:
    """Prints which GPUs make the best pairs, how they are joined and where they are."""
    joined = gpus.topology()
    print("\n".join(gpus.explain(joined, gpus.pairs(joined))))


def print_commands(arguments: argparse.Namespace) -> None:
    """Prints the settings, their reasons and the exact command of each replica; starts nothing."""
    show(launch.deployment_of(serve_options.wanted(arguments)))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for("serve", __doc__)
    commands = parser.add_subparsers(required=True, metavar="print|up|status|logs|reload|stop|pairs")
    folder = Parser(add_help=False)
    folder.add_argument("--folder", type=Path, default=serve_options.FOLDER, help="default: %(default)s")
    commands.add_parser("pairs", help=pairs.__doc__, description=pairs.__doc__).set_defaults(run=pairs)
    runs = {"print": print_commands, "up": up, "status": show_status, "logs": logs, "reload": reload, "stop": stop}
    for name, run in runs.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__, parents=[folder])
        command.set_defaults(run=run)
        if name in ("print", "up"):
            serve_options.add_wanted(command)

    serve_options.add_start(commands.choices["up"])
    serve_options.add_keys(commands.choices["reload"])
    commands.choices["status"].add_argument("--json", action="store_true", help="for programs")
    commands.choices["logs"].add_argument("names", nargs="*", metavar="replica0|router", help="default: all")
    commands.choices["logs"].add_argument(
        "--lines", type=int, default=100, metavar="N", help="of the past; default: 100"
    )
    words = sys.argv[1:] if argv is None else argv
    return parser.parse_args(["print" if word == "--print" else word for word in words])


def main() -> int | None:
    arguments = parse()
    return arguments.run(arguments)


if __name__ == "__main__":
    run_main(main)
