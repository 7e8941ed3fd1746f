"""Runs programs that a model wrote, each in a container of its own that can reach and keep nothing.

No network, no capability, no user of the host's, a read-only root; memory, processes, files, output and time are
bounded. Nothing is ever run on the host: without a docker daemon there is an error.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from docker.errors import APIError, DockerException, ImageNotFound
from docker.models.containers import Container
from docker.types import LogConfig, Ulimit
from requests.exceptions import RequestException

from v4forge.errors import UserError
from v4forge.images import containers, refusals
from v4forge.images.containers import Engine

LABEL = "io.v4forge.sandbox"
MEMORY_BYTES = 512 << 20
FILES_BYTES = 16 << 20  # below /tmp, the one place to write
PROCESSES = 64
# Of one program, with the start of its interpreter; the common scorer of these tasks gives 3 s to the program alone.
LIMIT_S = 10.0
CPU_S = 60  # after which it ends even where we have been killed
POLL_S = 0.05
# An argument of a program may be 128 KiB long; no answer of 1024 tokens is.
MOST_BYTES = 120_000
AT_ONCE = 4
DETAIL_CHARACTERS = 300
NOBODY = "65534:65534"

# Runs the program given as first argument as the main module, then prints the second: a program that ends early, with
# whatever exit code, has not passed. One that looks for the mark and prints it itself would; no scorer within the
# program's own process could tell.
LAUNCHER = """
import sys
source, mark = sys.argv[1:]
del sys.argv[1:]
exec(compile(source, "program", "exec"), {"__name__": "__main__"})
sys.__stdout__.write("\\n" + mark)
sys.__stdout__.flush()
"""


@dataclass(frozen=True)
class Verdict:
    """What became of a program: passed, failed, timeout or memory; and the end of what it said."""

    outcome: str
    detail: str
    elapsed_s: float

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def connect(image: str) -> Engine:
    """The daemon that has the image. Raises UserError where there is none: nothing is run elsewhere."""
    hint = f"{refusals.START}, then the same again; or leave such tasks out: --tasks"
    try:
        engine = containers.connect()
        engine.client.images.get(image)
    except UserError as error:
        raise UserError(f"programs of a model run in containers only: {error.fact}", hint) from None
    except ImageNotFound:
        fact = f"programs of a model run in containers only, and {refusals.no_image(image).fact}"
        raise UserError(fact, "make images, or --sandbox-image <one with python3>") from None
    except (APIError, RequestException) as error:
        raise UserError(f"programs of a model run in containers only: {error}", hint) from None
    return engine


def score(
    engine: Engine,
    image: str,
    programs: Sequence[str],
    progress: Callable[[int], None] = lambda _done: None,
    limit_s: float = LIMIT_S,
) -> list[Verdict]:
    """What becomes of each program when it is run by python3 in `image`. Raises UserError for what the daemon refuses.

    progress: called with how many are done.
    """
    _remove_leftovers(engine)
    verdicts = []
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        try:
            for verdict in pool.map(lambda program: _run(engine, image, program, limit_s), programs):
                verdicts.append(verdict)
                progress(len(verdicts))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return verdicts


def options(image: str, program: str, mark: str) -> dict[str, Any]:
    """A container for one program, as docker-py's arguments."""
    return {
        "image": image,
        "entrypoint": ["python3", "-s", "-B", "-c", LAUNCHER],
        "command": [program, mark],
        "labels": {LABEL: owner()},
        "user": NOBODY,
        # An image for CUDA asks for all GPUs, which a daemon whose runtime is NVIDIA's would give.
        "environment": {"HOME": "/tmp", "PYTHONHASHSEED": "0", "NVIDIA_VISIBLE_DEVICES": "void"},
        "healthcheck": {"test": ["NONE"]},
        "working_dir": "/tmp",
        "hostname": "sandbox",
        "network_mode": "none",
        "read_only": True,
        "tmpfs": {"/tmp": f"size={FILES_BYTES},mode=1777,noexec,nosuid,nodev"},
        "shm_size": FILES_BYTES,
        "ipc_mode": "private",
        "mem_limit": MEMORY_BYTES,
        "memswap_limit": MEMORY_BYTES,  # memory and swap together: no swap
        "pids_limit": PROCESSES,
        "nano_cpus": 10**9,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "ulimits": [
            Ulimit(name="core", soft=0, hard=0),
            Ulimit(name="cpu", soft=CPU_S, hard=CPU_S),
            Ulimit(name="nofile", soft=256, hard=256),
            Ulimit(name="fsize", soft=FILES_BYTES, hard=FILES_BYTES),
        ],
        "log_config": LogConfig(type="json-file", config={"max-size": "1m", "max-file": "1"}),
    }


def _run(engine: Engine, image: str, program: str, limit_s: float) -> Verdict:
    if len(program.encode()) > MOST_BYTES or "\0" in program:
        return Verdict("failed", "no program of this length, or with null characters, is run", 0.0)
    mark = secrets.token_hex(16)
    try:
        container = engine.client.containers.create(**options(image, program, mark))
        try:
            return _watch(container, mark, limit_s)
        finally:
            _remove(container)
    except (DockerException, RequestException) as error:
        raise UserError(f"the docker daemon refuses a program's container: {error}", "docker info") from None


def _watch(container: Container, mark: str, limit_s: float) -> Verdict:
    container.start()
    begun = time.monotonic()  # a daemon with much to do starts it late, which is not the program's fault
    while not (late := time.monotonic() - begun > limit_s):
        container.reload()
        if container.status == "exited":
            break
        time.sleep(POLL_S)
    elapsed_s = time.monotonic() - begun
    if late:
        return Verdict("timeout", f"it still ran after {limit_s:.0f} s", elapsed_s)
    said = container.logs(tail=20).decode(errors="replace")
    state: Mapping[str, Any] = container.attrs["State"]
    if state["OOMKilled"]:
        return Verdict("memory", f"it wanted more than {MEMORY_BYTES >> 20} MiB", elapsed_s)
    if state["ExitCode"] == 0 and mark in said:
        return Verdict("passed", "", elapsed_s)
    detail = said.strip()[-DETAIL_CHARACTERS:]
    return Verdict("failed", detail or f"it ended early, with {state['ExitCode']}", elapsed_s)


def _remove(container: Container) -> None:
    with suppress(DockerException, RequestException):
        container.remove(force=True, v=True)  # with volumes that its image declares


def _remove_leftovers(engine: Engine) -> None:
    """Removes the containers of runs that were killed, which nobody stops."""
    for container in _containers(engine):
        if not _lives(container.labels.get(LABEL, "")):
            _remove(container)


def _containers(engine: Engine) -> Iterable[Container]:
    found: Iterable[Container] = engine.client.containers.list(all=True, filters={"label": LABEL})
    return found


def owner(pid: int | None = None) -> str:
    """Whose a container is: this process, or that of another number, on this host."""
    return f"{pid or os.getpid()}@{socket.gethostname()}"


def _lives(named: str) -> bool:
    """Whether an owner may still be there: of those of other hosts, which may share the daemon, nobody knows."""
    pid, _, host = named.partition("@")
    if host != socket.gethostname():
        return True
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
