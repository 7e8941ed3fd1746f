"""What has to hold before replicas are started, and the wait until they answer."""

from __future__ import annotations

import errno
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from v4forge import artifact_folder, gpus, pins
from v4forge.errors import UserError
from v4forge.serving import client
from v4forge.serving.deployment import Plan, Process, Runtime

POLL_S = 1.0
ANSWER_S = 10.0
SHOWN_LINES = 25
# Of the lines in a replica's log, those that say how far its start is.
STEPS = re.compile(
    r"Loading safetensors[^:]*: +\d+%|Loading weights took|Capturing CUDA graphs?[^:]*: +\d+%|Compiling"
    r"|Starting to load model|Model loading took|init engine|Application startup complete"
)


def check_certificate(plan: Plan) -> None:
    """Raises UserError unless verify has passed on the artifact as it is, by the digest of its SHA256SUMS."""
    artifact = Path(plan.artifact)
    if not (artifact / "config.json").is_file():
        raise UserError(f"there is no artifact in {artifact}", "make artifact, or make serve ARTIFACT=<folder>")
    again = f"python -m scripts.verify --artifact {artifact}, or serve it all the same: make serve ALLOW=certificate"
    artifact_folder.check(artifact, again)


def check_gpus(plan: Plan) -> None:
    """Raises UserError unless the GPUs of the plan can hold and run the artifact."""
    if plan.backend != "cuda":
        return
    chosen = {int(device) for devices in plan.gpus for device in devices}
    found = [gpu for gpu in gpus.gpus() if gpu.index in chosen]
    if absent := sorted(chosen - {gpu.index for gpu in found}):
        raise UserError(f"there is no GPU {absent[0]}", "nvidia-smi -L lists them; make serve DEVICES=<some of them>")
    size = sum(path.stat().st_size for path in Path(plan.artifact).glob("*.safetensors"))
    share = float(plan.serving.value("gpu-memory-utilization") or 0.9)
    minimum = pins.read()["CUDA_DRIVER_MIN"]
    programs = gpus.processes()
    for line in gpus.check_can_serve(
        found, plan.serving.tensor_parallel, size, share, minimum, programs, plan.replicas
    ):
        print(f"serve: {line}", flush=True)


def check_ports(plan: Plan) -> None:
    """Raises UserError for an address that is not this machine's, or a port on it that another program has."""
    for address, port in plan.ports():
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port {port} on {address} is taken", f"make serve PORT={plan.port + 100}") from None
            raise UserError(f"cannot listen on {address}:{port}: {error.strerror}", "make serve BIND=0.0.0.0") from None
        except OverflowError:
            raise UserError(f"{port} is no port", "make serve PORT=8000") from None


@dataclass(frozen=True)
class Guard:
    """A check before the start; `name` is what ALLOW takes to leave it out."""

    name: str
    check: Callable[[Plan], None]


GUARDS = (Guard("certificate", check_certificate), Guard("gpu", check_gpus), Guard("ports", check_ports))


def check(plan: Plan, allowed: Iterable[str], say: Callable[[str], None]) -> None:
    """Runs every guard; one that is allowed to fail says what it found."""
    for guard in GUARDS:
        try:
            guard.check(plan)
        except UserError as error:
            if guard.name not in allowed:
                raise
            say(f"serve: allowed by ALLOW={guard.name}: {error.fact}")


def ready(plan: Plan, number: int) -> bool:
    """Whether the router gives requests to this replica, and it answers."""
    try:
        client.fetch(plan.endpoints[number], "/health", limit_s=ANSWER_S)
    except UserError:
        return False
    return True


def wait(runtime: Runtime, timeout_s: float, progress: Callable[[int, str], None]) -> None:
    """Returns when every replica is ready. Raises UserError, with the end of its log on the screen, when a process has
    ended, even if it was started again, and after `timeout_s`."""
    plan, started = runtime.plan, time.monotonic()
    waiting = list(range(plan.replicas))
    first: dict[str, str] = {}
    while waiting:
        for name, process in runtime.processes().items():
            run = first.setdefault(name, process.run) if process.state == "running" else process.run
            if process.state in ("exited", "missing") or process.run != run:
                raise _ended(runtime, name, process)
        waiting = [number for number in waiting if not ready(plan, number)]
        if waiting and time.monotonic() - started > timeout_s:
            name = plan.names[waiting[0]]
            print(_tail(runtime.log(name)), flush=True)
            raise UserError(f"{name} is not ready after {timeout_s:.0f} s (its log above)", "make serve TIMEOUT=7200")
        progress(plan.replicas - len(waiting), _step(runtime, [plan.names[number] for number in waiting]))
        if waiting:
            time.sleep(POLL_S)


def _step(runtime: Runtime, names: Sequence[str]) -> str:
    """How far the first of these replicas is, by its log."""
    if not names:
        return "ready"
    found = STEPS.findall(runtime.log(names[0]))
    return f"{names[0]}: {found[-1].strip() if found else 'starting'}"


def _ended(runtime: Runtime, name: str, process: Process) -> UserError:
    log = runtime.log(name)
    print(_tail(log), flush=True)
    # The server's last error may only say that its engine has one, and a warning may speak of an error.
    unlikely = ("Engine core", " INFO ", " WARNING ")
    lines = [line for line in log.splitlines() if not any(words in line for words in unlikely)]
    errors = re.findall(r"\w*Error: .+", "\n".join(lines))
    return UserError(
        f"{name} has ended: {(errors or [process.state])[-1][:400]}",
        "its log is above; make serve-logs shows all of them",
    )


def _tail(log: str) -> str:
    return "\n".join(log.splitlines()[-SHOWN_LINES:])


def show_errors(runtime: Runtime) -> None:
    """Shows the end of the log of every replica that does not answer."""
    for number, name in enumerate(runtime.plan.names):
        if not ready(runtime.plan, number):
            print(_tail(runtime.log(name)), flush=True)
