"""The wait for replicas: until each answers, or one has ended, whose own error is told."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from v4forge.errors import UserError
from v4forge.serving import client
from v4forge.serving.deployment import Deployment, Process, Runtime

POLL_S = 1.0
ANSWER_S = 10.0
SHOWN_LINES = 25
# The server's last error may only say that its engine has one; what it logs may speak of an error that is none.
ERROR, LOGGED = re.compile(r"\w*Error: .+"), re.compile(" INFO | WARNING ")
# Of the lines in a replica's log, those that say how far its start is.
STEPS = re.compile(
    r"Loading safetensors[^:]*: +\d+%|Loading weights took|Capturing CUDA graphs?[^:]*: +\d+%|Compiling"
    r"|Starting to load model|Model loading took|init engine|Application startup complete"
)


def ready(deployment: Deployment, number: int) -> bool:
    """Whether the router gives requests to this replica, and it answers."""
    try:
        client.fetch(deployment.endpoints[number], "/health", limit_s=ANSWER_S)
    except UserError:
        return False
    return True


def wait(
    runtime: Runtime, timeout_s: float, progress: Callable[[int, str], None], only: Sequence[int] | None = None
) -> None:
    """Returns when every replica is ready, or those in `only`. Raises UserError, with the end of its log on the screen,
    when one of these or the router has ended, even if it was started again, and after `timeout_s`."""
    deployment, started = runtime.deployment, time.monotonic()
    waiting = list(range(deployment.replicas) if only is None else only)
    others = {name for number, name in enumerate(deployment.names) if number not in waiting}
    total = len(waiting)
    first: dict[str, str] = {}
    while waiting:
        for name, process in runtime.processes().items():
            if name in others:
                continue
            run = first.setdefault(name, process.run) if process.run else ""
            if process.state in ("exited", "missing") or process.run != run:
                raise _ended(runtime, name, process)
        waiting = [number for number in waiting if not ready(deployment, number)]
        if waiting and time.monotonic() - started > timeout_s:
            name = deployment.names[waiting[0]]
            print(_tail(runtime.log(name)), flush=True)
            raise UserError(f"{name} is not ready after {timeout_s:.0f} s (its log above)", "make serve TIMEOUT=7200")
        progress(total - len(waiting), _step(runtime, [deployment.names[number] for number in waiting]))
        if waiting:
            time.sleep(POLL_S)


def _step(runtime: Runtime, names: Sequence[str]) -> str:
    """How far the first of these replicas is, by its log."""
    if not names:
        return "ready"
    found = STEPS.findall(runtime.log(names[0]))
    return f"{names[0]}: {found[-1].strip() if found else 'starting'}"


def _ended(runtime: Runtime, name: str, process: Process) -> UserError:
    lines = runtime.log(name).splitlines()
    told = [place for place, line in enumerate(lines) if ERROR.search(line) and not LOGGED.search(line)]
    ended = "\n".join(lines[: told[-1] + 1] if told else lines)  # without what it says when it starts again
    print(_tail(ended), flush=True)
    errors = [ERROR.findall(lines[place])[-1] for place in told if "Engine core" not in lines[place]]
    return UserError(
        f"{name} has ended: {(errors or [process.state])[-1][:400]}",
        "its log is above; make serve-logs shows all of them",
    )


def _tail(log: str) -> str:
    return "\n".join(log.splitlines()[-SHOWN_LINES:])


def show_errors(runtime: Runtime) -> None:
    """Shows the end of the log of every replica that does not answer."""
    for number, name in enumerate(runtime.deployment.names):
        if not ready(runtime.deployment, number):
            print(_tail(runtime.log(name)), flush=True)
