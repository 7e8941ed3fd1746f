"""What serve and the benches share on the command line: which deployment is asked for, and how it is started."""

from __future__ import annotations

import argparse
from pathlib import Path

from v4forge.serving import settings
from v4forge.serving.launch import Start, Wanted

from . import certified
from .cli import pair

ARTIFACT = "scratch/tiny/artifact"
FOLDER = Path("scratch/tiny/serve")


def add_wanted(command: argparse._ActionsContainer, profile: str = Wanted.profile) -> None:
    """The options that say what is started, by default with the settings of a profile."""
    add = command.add_argument
    add("--artifact", default=ARTIFACT, metavar="DIR", help="default: %(default)s")
    add("--serve-profile", default=profile, metavar="NAME",
        help=f"one of: {', '.join(settings.profiles())}; default: %(default)s")  # fmt: skip
    add("--runtime", choices=("", "docker", "host"), default="", help="default: docker; host for BACKEND=cpu")
    add("--backend", choices=("cuda", "cpu"), default=Wanted.backend, help="default: cuda; cpu is for tests")
    add("--replicas", type=int, default=0, metavar="N", help="default: as many as there are GPUs for")
    add("--tp", type=int, default=0, metavar="N", help="GPUs of a replica: 1, 2, 4 or 8; default: the profile's")
    add("--devices", default="", metavar="0,1,…",
        help="GPUs or their UUIDs, replica by replica; default: those of CUDA_VISIBLE_DEVICES, or all, by their links"
    )  # fmt: skip
    add("--drafts", type=int, metavar="K", help="drafts a step, 0 for none; default: the profile's")
    add(
        "--set",
        nargs="+",
        type=pair("OPTION=VALUE"),
        default=[],
        metavar="OPTION=VALUE",
        help="other options of vllm serve",
    )
    add("--bind", default=Wanted.bind, metavar="ADDRESS", help="0.0.0.0 opens it to the network; default: %(default)s")
    add("--port", type=int, default=Wanted.port, help="and the next one, for this machine; default: %(default)s")
    add("--cert", default="", metavar="FILE", help="PEM: the endpoint speaks TLS with it")
    add("--cert-key", default="", metavar="FILE", help="PEM: its key, where the first file has none")
    add("--drain", type=int, default=Wanted.drain_s, metavar="S",
        help="a stop waits so long for requests; default: %(default)s")  # fmt: skip
    add(
        "--queue",
        type=int,
        metavar="N",
        help="requests that may wait at a replica; default: as many as run, at least 128",
    )
    add("--per-source", type=int, default=Wanted.per_source, metavar="N",
        help="connections that an address may have; default: %(default)s")  # fmt: skip
    add("--watchdog", type=int, default=Wanted.watchdog_s, metavar="S",
        help="a server that hangs for so long is ended and started again, 0 for never; default: %(default)s"
    )  # fmt: skip
    add("--metrics", action="store_true", help="Prometheus and Grafana too")
    add("--compose-file", nargs="+", default=[], metavar="FILE",
        help="on top of compose.yaml: more mounts, other limits")  # fmt: skip
    add("--program", default="", metavar="DIR", help="without docker: the folder of vllm's program")


def add_keys(command: argparse._ActionsContainer) -> None:
    command.add_argument("--api-key-file", default="", metavar="FILE",
        help="clients must send a key in it, a line each: name:key, name:key:requests a minute; or the variable API_KEY"
    )  # fmt: skip


def add_start(command: argparse._ActionsContainer) -> None:
    """The options that say how it is started."""
    add = command.add_argument
    add_keys(command)
    add("--timeout", type=float, default=Start.timeout_s, metavar="S",
        help="until every replica is ready; default: %(default)s")  # fmt: skip
    add("--min-acceptance", type=float, default=Start.min_acceptance, metavar="SHARE",
        help="of first drafts, in the probe; default: %(default)s")  # fmt: skip
    add("--allow", nargs="+", default=[], metavar="GUARD", help="guards and probe checks that may fail")
    certified.add_options(command)
    add("--keep", action="store_true", help="leave what was started when the probe fails")


def wanted(arguments: argparse.Namespace) -> Wanted:
    """What the options of add_wanted(), and --folder, ask for."""
    return Wanted(
        folder=arguments.folder,
        artifact=Path(arguments.artifact),
        profile=arguments.serve_profile,
        runtime=arguments.runtime,
        backend=arguments.backend,
        replicas=arguments.replicas,
        width=arguments.tp,
        devices=arguments.devices,
        drafts=arguments.drafts,
        overrides=dict(arguments.set),
        bind=arguments.bind,
        port=arguments.port,
        cert=arguments.cert,
        cert_key=arguments.cert_key,
        drain_s=arguments.drain,
        waiting=arguments.queue,
        per_source=arguments.per_source,
        watchdog_s=arguments.watchdog,
        metrics=arguments.metrics,
        compose=arguments.compose_file,
        program=arguments.program,
    )


def start(arguments: argparse.Namespace) -> Start:
    """What the options of add_start() ask for, besides the key."""
    return Start(
        *(arguments.timeout, arguments.min_acceptance, arguments.allow, arguments.keep),
        check=arguments.check,
        verify_key=arguments.verify_key,
    )
