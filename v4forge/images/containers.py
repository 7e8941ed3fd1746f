"""Runs a program in a container: as the caller, with its output passed on as it comes and signals passed to it, and
with its container removed whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from docker.client import DockerClient
from docker.errors import APIError, DockerException, ImageNotFound
from docker.models.containers import Container
from docker.types import Ulimit
from requests.exceptions import ReadTimeout, RequestException

from v4forge import network
from v4forge.errors import UserError
from v4forge.images import jobs, refusals
from v4forge.images.jobs import RUN_LABEL, ULIMITS, Job

CODE_LABEL, LANE_LABEL = "io.v4forge.code", "io.v4forge.lane"
POLL_S = 0.1
GRACE_S = 30.0  # from a signal to SIGKILL


@dataclass(frozen=True)
class Engine:
    """A docker daemon; `security` names how it confines containers: rootless, selinux, userns and others."""

    client: DockerClient
    security: frozenset[str]


@dataclass(frozen=True)
class Image:
    """An image that the daemon has: its id, and the lane it was built in."""

    id: str
    lane: str


def connect(environment: Mapping[str, str] = os.environ, instead: str = refusals.WITHOUT) -> Engine:
    """The daemon that DOCKER_HOST names, else the one at docker's usual socket. Raises UserError when none answers.
    instead: what helps where there is none."""
    where = environment.get("DOCKER_HOST") or "docker's usual socket"
    try:
        client = DockerClient.from_env(environment=environment)
        security = client.info()["SecurityOptions"] or []
    except (DockerException, RequestException) as error:
        closed = "PermissionError" in str(error)
        raise (refusals.forbidden(where, instead) if closed else refusals.silent(where, instead)) from None
    except (OSError, ValueError) as error:  # what it names is no address, or its certificates are not there
        fact = f"DOCKER_HOST={network.shown(where)} cannot be asked: {error}"
        raise UserError(fact, "unset DOCKER_HOST DOCKER_TLS_VERIFY DOCKER_CERT_PATH") from None
    return Engine(client, frozenset(option.split(",")[0].removeprefix("name=") for option in security))


def find(engine: Engine, reference: str, code: str) -> Image:
    """The image of that reference. Raises UserError when it is missing, or holds other code than `code`, the digest
    of the checkout's: stamps and fingerprints speak of the checkout's code."""
    try:
        found = engine.client.images.get(reference)
    except ImageNotFound:
        raise refusals.no_image(reference) from None
    if found.labels.get(CODE_LABEL) != code:
        raise UserError(f"the image {reference} holds other code than this checkout", "make images")
    return Image(str(found.id), found.labels.get(LANE_LABEL, ""))


def labels(engine: Engine, reference: str) -> dict[str, str]:
    """The labels of an image that the daemon has. Raises UserError when it has not."""
    try:
        return dict(engine.client.images.get(reference).labels)
    except ImageNotFound:
        raise refusals.no_image(reference) from None


def identity(engine: Engine, reference: str) -> str:
    """The id of an image that the daemon has. Raises UserError when it has not."""
    try:
        return str(engine.client.images.get(reference).id)
    except ImageNotFound:
        raise refusals.no_image(reference) from None


def run(engine: Engine, job: Job) -> int:
    """Runs a job to its end and returns its exit code; its output goes to ours, on a terminal of ours' size if we have
    one. Nobody else starts a job in its folder meanwhile: the caller holds a lock.

    SIGINT, SIGTERM and SIGHUP are passed on; a second one kills the program, and so do thirty seconds. Raises
    KeyboardInterrupt after a SIGINT, UserError for what the daemon refuses.
    """
    with _explained(job), _recorded(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as received:
        _remove_leftovers(engine, job)
        try:
            code = _run(engine, job, ULIMITS, received)
        except APIError as error:
            if "rlimit" not in str(error):
                raise
            code = _run(engine, job, (), received)  # a daemon without the right to raise limits
    if signal.SIGINT in received[:1]:
        raise KeyboardInterrupt
    return code


def _run(engine: Engine, job: Job, ulimits: Sequence[Ulimit], received: Sequence[int]) -> int:
    tty = sys.stdout.isatty() and sys.stderr.isatty()
    chosen = jobs.options(job, engine.security, ulimits)
    with ThreadPoolExecutor(1) as pool:
        container = engine.client.containers.create(job.image, job.words[1:], tty=tty, **chosen)
        try:
            stream = container.attach(stream=True, demux=not tty)
            container.start()
            end = pool.submit(_follow, container, stream)
            _attend(container, end, received, tty)
            return end.result()
        finally:
            with suppress(DockerException, RequestException):
                container.remove(force=True)


def output(engine: Engine, job: Job, limit_s: float) -> tuple[int, str]:
    """Runs a short job to its end -> its exit code, and what it said on both of its outputs.

    It raises no limits: a daemon that may not do that would refuse. Raises UserError for what the daemon refuses, and
    for a job that has not ended after `limit_s`.
    """
    with _explained(job):
        container = engine.client.containers.create(
            job.image, job.words[1:], **jobs.options(job, engine.security, ulimits=())
        )
        try:
            container.start()
            code = int(container.wait(timeout=limit_s)["StatusCode"])
            return code, container.logs().decode(errors="replace")
        except ReadTimeout:
            fact = f"{job.command[0]} has not ended after {limit_s:.0f} s in the image {job.image}"
            raise UserError(fact, "docker ps, docker info") from None
        finally:
            with suppress(DockerException, RequestException):
                container.remove(force=True)


def _follow(container: Container, stream: Iterable[Any]) -> int:
    """Copies a container's output to ours until it ends -> its exit code."""
    for chunk in stream:
        for part, file in zip(chunk if isinstance(chunk, tuple) else [chunk], (sys.stdout, sys.stderr), strict=False):
            if part:
                file.buffer.write(part)
                file.flush()
    return int(container.wait(timeout=None)["StatusCode"])


def _attend(container: Container, end: Future[int], received: Sequence[int], tty: bool) -> None:
    """Passes on signals, and changes of the terminal's size, until the end."""
    passed, deadline = 0, float("inf")
    size: os.terminal_size | None = None
    while not wait([end], POLL_S).done:
        with suppress(APIError):  # it has ended meanwhile
            if len(received) > passed:
                container.kill("SIGKILL" if passed else signal.Signals(received[0]).name)
                passed, deadline = passed + 1, min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline:
                container.kill("SIGKILL")
            if tty and (now := os.get_terminal_size(sys.stdout.fileno())) != size:
                container.resize(now.lines, now.columns)
                size = now


@contextmanager
def _recorded(*signals: signal.Signals) -> Iterator[list[int]]:
    """The numbers of the signals that arrive in the block, which they do not interrupt."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _frame: received.append(number)) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _remove_leftovers(engine: Engine, job: Job) -> None:
    """Removes the containers that killed runs left of the same folder; UserError when one of them still runs."""
    label = f"{RUN_LABEL}={job.run}"
    for container in engine.client.containers.list(all=True, filters={"label": label}):
        if container.status in ("running", "paused", "restarting"):
            fact = f"{container.name}, of a run that was killed, still writes to {job.work}"
            raise UserError(fact, f"wait for it, or: docker stop {container.name}")
        with suppress(APIError):
            container.remove(force=True)


@contextmanager
def _explained(job: Job) -> Iterator[None]:
    """Makes a daemon's refusal, and its disappearance, errors that a user can act on."""
    try:
        yield
    except ImageNotFound:
        raise refusals.no_image(job.image) from None
    except APIError as error:
        said = " ".join(str(error.explanation or error).split())
        raise refusals.explained(said, refusals.OF_A_JOB, refusals.refused(said)) from None
    except RequestException as error:
        raise refusals.gone(error, ", then run the same again: what is finished is kept") from None


def shell(engine: Engine, job: Job) -> NoReturn:
    """Becomes the docker command that runs the job with our terminal, and all else as `run` has it."""
    if shutil.which("docker") is None:
        raise UserError("there is no docker command, which a shell needs", refusals.INSTALL)
    with _explained(job):
        engine.client.images.get(job.image)
    terminal = ["--tty"] if sys.stdin.isatty() and sys.stdout.isatty() else []
    words = jobs.command_line(job, engine.security, "--interactive", *terminal)
    os.execvpe(words[0], words, {**os.environ, **jobs.environment(job)})
