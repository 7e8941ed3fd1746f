"""Serves an artifact: replicas of vLLM behind one OpenAI-compatible endpoint, speculation on; the Makefile calls it.

python -m scripts.serve print  --artifact scratch/flash/artifact --folder scratch/flash/serve     (or --print)
python -m scripts.serve up     --artifact scratch/flash/artifact --folder scratch/flash/serve
python -m scripts.serve status --folder scratch/flash/serve
python -m scripts.serve logs   --folder scratch/flash/serve
python -m scripts.serve stop   --folder scratch/flash/serve

up returns when every replica is ready and a probe of each has passed. An API key comes from the variable API_KEY or a
file, never from the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from scripts.cli import pair, parser_for, say, steps
from v4forge import gpus, outcomes
from v4forge.checkout import ROOT
from v4forge.errors import UserError, run_main
from v4forge.files import write_text
from v4forge.images import containers, definitions
from v4forge.outcomes import Outcome
from v4forge.serving import deployment, preflight, probe, readiness, settings, status
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import Plan, Runtime
from v4forge.serving.probe import FLOOR, Expected
from v4forge.serving.supervisord import Supervised

ARTIFACT = "scratch/tiny/artifact"
CPU_REPLICAS = 2
# Where vllm is without docker.
PROGRAMS = {"cuda": ROOT / ".venv-serve/bin", "cpu": ROOT / ".venv-serve-cpu/bin"}
NOTHING = "nothing is served from {}"


def runtime_of(plan: Plan) -> Runtime:
    return Compose(plan) if plan.runtime == "docker" else Supervised(plan)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the arguments ask for. Raises UserError for what this machine has not."""
    overrides = dict(arguments.set)
    if arguments.drafts is not None:
        overrides |= {settings.DRAFTS: str(arguments.drafts), settings.DRAFT_METHOD: "mtp"}
    chosen = settings.serving(arguments.serve_profile, arguments.backend, overrides)
    plan = Plan(
        folder=os.path.abspath(arguments.folder),
        artifact=os.path.abspath(arguments.artifact),
        runtime=arguments.runtime or ("docker" if arguments.backend == "cuda" else "host"),
        backend=arguments.backend,
        profile=arguments.serve_profile,
        overrides=overrides,
        gpus=devices(arguments, chosen.tensor_parallel),
        bind=arguments.bind,
        port=arguments.port,
        drain_s=arguments.drain,
        affinity=arguments.affinity,
        metrics=arguments.metrics,
        compose=[os.path.abspath(file) for file in arguments.compose_file],
    )
    if plan.metrics and plan.runtime == "host":
        raise UserError("Prometheus and Grafana run in containers", "make serve RUNTIME=docker METRICS=1")
    if plan.runtime == "host":
        return replace(plan, program=os.path.abspath(arguments.program or PROGRAMS[plan.backend]))
    return replace(plan, image=definitions.resolve("serve"))


def devices(arguments: argparse.Namespace, tensor_parallel: int) -> list[list[str]]:
    """The GPUs of each replica, by nvidia-smi's numbers: pairs as they are joined; () each on a CPU."""
    if arguments.backend == "cpu":
        return [[] for _ in range(arguments.replicas or CPU_REPLICAS)]
    given = [device.strip() for device in arguments.devices.split(",") if device.strip()]
    if any(not device.isdigit() for device in given) or len(set(given)) < len(given):
        raise UserError(f"DEVICES={arguments.devices} is not a list of GPUs", "make serve DEVICES=0,1,2,3")
    if given:
        order = given
    elif tensor_parallel == 2:
        order = [str(gpu) for pair in gpus.pairs(gpus.topology()) for gpu in pair]
    else:
        order = [str(gpu.index) for gpu in gpus.gpus()]
    groups = [order[start : start + tensor_parallel] for start in range(0, len(order), tensor_parallel)]
    whole = [group for group in groups if len(group) == tensor_parallel]
    count = arguments.replicas or len(whole)
    if not whole or count > len(whole):
        fact = f"{count or 1} replicas of {tensor_parallel} GPUs need {(count or 1) * tensor_parallel}, there are"
        raise UserError(f"{fact} {len(order)}", f"make serve REPLICAS={len(whole)}" if whole else "nvidia-smi -L")
    return whole[:count]


def read_key(file: str) -> str:
    """The API key in a file, or in the variable API_KEY, which no program that we start shall have; "" for none."""
    key = os.environ.pop("API_KEY", "").strip()
    if not file:
        return key
    hint = "make serve API_KEY_FILE=<a file of one line>"
    try:
        key = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the API key cannot be read: {error}", hint) from None
    if not key:
        raise UserError(f"there is no key in {file}", hint)
    return key


def write_key(plan: Plan, key: str) -> None:
    """Keeps the key where only who serves can read it."""
    previous = os.umask(0o077)
    try:
        write_text(Path(plan.key_file), key + "\n")
    finally:
        os.umask(previous)


def show(plan: Plan) -> None:
    """The settings with their reasons, then the exact command of each replica and of the router."""
    chosen = plan.serving
    print(f"{chosen.profile}: {settings.profiles()[chosen.profile]}\n")
    rows = [(" ".join(row.words()), f"{row.why} ({row.source})") for row in chosen.settings.values() if row.words()]
    for words, reason in rows:
        print(f"  {words}\n      {reason}")
    runtime = runtime_of(plan)
    print()
    for number, name in enumerate(plan.names):
        where = {"CUDA_VISIBLE_DEVICES": ",".join(plan.gpus[number])} if plan.gpus[number] else {}
        shown = [f"{key}={shlex.quote(value)}" for key, value in (where | plan.variables(number)).items()]
        print(f"{name}:\n  {' '.join(shown)} \\\n  vllm serve {shlex.join(plan.arguments(number))}\n")
    if isinstance(runtime, Compose):
        shown = [f"{key}={shlex.quote(value)}" for key, value in runtime.variables().items()]
        print(f"all of it:\n  {' '.join(shown)} \\\n  {shlex.join(runtime.command('up', '--detach'))}\n")
    print(f"router: {plan.url}, and for this machine only {plan.admin_url}")


def up(arguments: argparse.Namespace) -> None:
    """Starts what is asked for, waits until it is ready and has passed the probe."""
    key = read_key(arguments.api_key_file)
    plan = plan_of(arguments)
    plan = replace(plan, key_file=str(Path(plan.folder) / "api_key") if key else "")
    running = deployment.load(Path(plan.folder))
    if running and (other := deployment.differing(running, plan) or ["key"] * (running.key != key)):
        raise UserError(f"other replicas run already, with another {', '.join(other)}", "make serve-stop")
    runtime = runtime_of(plan)
    if not running:
        preflight.check(plan, arguments.allow, say)
        if isinstance(runtime, Compose):
            check_image(plan)
            runtime.check_readable()
        elif not (Path(plan.program) / "vllm").exists():
            hint = "make env-serve-cpu" if plan.backend == "cpu" else "make serve RUNTIME=docker, or --program <folder>"
            raise UserError(f"there is no vllm in {plan.program}", hint)
        if key:
            write_key(plan, key)
        runtime.write()
        deployment.save(plan)
    say(f"serve: {plan.replicas} x TP={plan.serving.tensor_parallel}, k={plan.serving.drafts}, {plan.artifact}")
    if not running:
        for number, group in enumerate(plan.gpus):
            if group:
                say(f"serve: replica{number} on GPU {','.join(group)}")
    try:
        runtime.start()
        with steps("serve", plan.replicas, "replicas") as progress:
            readiness.wait(runtime, arguments.timeout, progress)
        expected = Expected(
            plan.serving.model, plan.serving.drafts > 0, plan.serving.tensor_parallel, arguments.min_acceptance
        )
        with steps("probe", plan.replicas, "replicas") as progress:
            checks = probe.probe(plan.endpoints, expected, lambda number: runtime.log(plan.names[number]), progress)
        say("\n".join(outcomes.lines(checks)))
        failed = [check for check in checks if not check.ok and kind(check) not in arguments.allow]
        if failed:
            readiness.show_errors(runtime)
            hint = f"make serve-logs says more; serve all the same: make serve ALLOW={kind(failed[0])}"
            raise UserError(f"the probe failed: {failed[0].name}: {failed[0].detail}", hint)
    except (UserError, KeyboardInterrupt):
        if not (arguments.keep or running):
            say("serve: stopping what was started (KEEP=1 leaves it)")
            bring_down(runtime)
        raise
    say(f"ready: {plan.url}")


def kind(check: Outcome) -> str:
    """What ALLOW calls it, whichever replica it is about."""
    return check.name.rpartition(": ")[2].replace(" ", "-")


def check_image(plan: Plan) -> None:
    """Raises UserError unless the daemon has the image, built from the versions of this checkout."""
    labels = containers.labels(containers.connect(), plan.image)
    for label, wanted in definitions.expected_labels("serve").items():
        if labels.get(label) != wanted:
            raise UserError(
                f"the image {plan.image} was built from other versions ({label})", "make images IMAGE=serve"
            )


def bring_down(runtime: Runtime) -> None:
    runtime.stop(say)
    deployment.forget(runtime.plan)
    if runtime.plan.key_file:
        Path(runtime.plan.key_file).unlink(missing_ok=True)


def running_in(folder: Path) -> Runtime:
    plan = deployment.load(folder)
    if plan is None:
        raise UserError(NOTHING.format(folder), "make serve")
    return runtime_of(plan)


def show_status(arguments: argparse.Namespace) -> int:
    """What runs: state, model, uptime, queue, tok/s, draft acceptance, KV cache. Exit code 1 if one is not ready."""
    runtime = running_in(arguments.folder)
    rows = status.rows(runtime.plan, runtime.processes())
    if arguments.json:
        print(json.dumps([row.json() for row in rows], indent=1))
    else:
        table = Table(box=None)
        columns = ("", "state", "up", "running", "waiting", "tok/s", "drafts accepted", "KV cache")
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
        models = ", ".join(sorted({row.model for row in rows if row.model})) or runtime.plan.serving.model
        print(f"{models} at {runtime.plan.url}, k={runtime.plan.serving.drafts}, profile {runtime.plan.profile}")
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
    runtime = running_in(arguments.folder)
    known = [*runtime.plan.names, deployment.ROUTER]
    if unknown := [name for name in arguments.names if name not in known]:
        raise UserError(f"there is no {unknown[0]}", f"choose from: {', '.join(known)}")
    runtime.follow(arguments.names, arguments.lines)
    raise AssertionError("follow() has replaced this program")


def stop(arguments: argparse.Namespace) -> None:
    """Takes no new request, waits for those that run, stops everything."""
    plan = deployment.load(arguments.folder)
    if plan is None:
        say(NOTHING.format(arguments.folder))
        return
    say(f"serve: draining, for at most {plan.drain_s} s")
    bring_down(runtime_of(plan))
    say("serve: stopped")


def pairs(arguments: argparse.Namespace) -> None:
    """Prints which GPUs make the best pairs, how they are joined and where they are."""
    joined = gpus.topology()
    print("\n".join(gpus.explain(joined, gpus.pairs(joined))))


def print_plan(arguments: argparse.Namespace) -> None:
    """Prints the settings, their reasons and the exact command of each replica; starts nothing."""
    show(plan_of(arguments))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for("serve", __doc__)
    commands = parser.add_subparsers(required=True, metavar="print|up|status|logs|stop|pairs")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--folder", type=Path, default=Path("scratch/tiny/serve"), help="default: %(default)s")
    commands.add_parser("pairs", help=pairs.__doc__, description=pairs.__doc__).set_defaults(run=pairs)
    for name, run in {"print": print_plan, "up": up, "status": show_status, "logs": logs, "stop": stop}.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__, parents=[folder])
        command.set_defaults(run=run)
        if name in ("print", "up"):
            add_plan(command)

    add_start(commands.choices["up"])
    commands.choices["status"].add_argument("--json", action="store_true", help="for programs")
    commands.choices["logs"].add_argument("names", nargs="*", metavar="replica0|router", help="default: all")
    commands.choices["logs"].add_argument(
        "--lines", type=int, default=100, metavar="N", help="of the past; default: 100"
    )
    words = sys.argv[1:] if argv is None else argv
    return parser.parse_args(["print" if word == "--print" else word for word in words])


def add_start(command: argparse._ActionsContainer) -> None:
    """The options that say how it is started."""
    add = command.add_argument
    add("--api-key-file", default="", metavar="FILE", help="clients must send the key in it; or the variable API_KEY")
    add("--timeout", type=float, default=2700, metavar="S", help="until every replica is ready; default: %(default)s")
    add(
        "--min-acceptance",
        type=float,
        default=FLOOR,
        metavar="SHARE",
        help="of first drafts, in the probe; default: %(default)s",
    )
    add("--allow", nargs="+", default=[], metavar="GUARD", help="guards and probe checks that may fail")
    add("--keep", action="store_true", help="leave what was started when the probe fails")


def add_plan(command: argparse._ActionsContainer) -> None:
    """The options that say what is started."""
    add = command.add_argument
    add("--artifact", default=ARTIFACT, metavar="DIR", help="default: %(default)s")
    add("--serve-profile", default="published", metavar="NAME", help=f"one of: {', '.join(settings.profiles())}")
    add("--runtime", choices=("", "docker", "host"), default="", help="default: docker; host for BACKEND=cpu")
    add("--backend", choices=("cuda", "cpu"), default="cuda", help="default: cuda; cpu is for tests")
    add("--replicas", type=int, default=0, metavar="N", help="default: as many as there are GPUs for")
    add("--devices", default="", metavar="0,1,…", help="GPUs, replica by replica; default: pairs by their links")
    add("--drafts", type=int, metavar="K", help="drafts a step, 0 for none; default: the profile's")
    add(
        "--set",
        nargs="+",
        type=pair("OPTION=VALUE"),
        default=[],
        metavar="OPTION=VALUE",
        help="other options of vllm serve",
    )
    add("--bind", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 opens it to the network; default: %(default)s")
    add("--port", type=int, default=8000, help="and the next one, for this machine; default: %(default)s")
    add("--drain", type=int, default=600, metavar="S", help="a stop waits so long for requests; default: %(default)s")
    add("--affinity", action="store_true", help="requests with one X-Session-Id go to one replica")
    add("--metrics", action="store_true", help="Prometheus and Grafana too")
    add(
        "--compose-file",
        nargs="+",
        default=[],
        metavar="FILE",
        help="on top of compose.yaml: more mounts, other limits",
    )
    add("--program", default="", metavar="DIR", help="without docker: the folder of vllm's program")


def main() -> int | None:
    arguments = parse()
    return arguments.run(arguments)


if __name__ == "__main__":
    run_main(main)
