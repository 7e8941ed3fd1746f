"""What docker refuses, as errors that a user can act on: a fact, and a command for the place where it was refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from v4forge.errors import UserError

WITHOUT = "run without docker: make … RUNTIME=host"
INSTALL = "apt-get install docker.io"
START = "sudo systemctl start docker"
STATUS = "sudo systemctl status docker"
ANOTHER_FOLDER = f"choose a SCRATCH on a local disk, or {WITHOUT}"
ANOTHER_PORT = "make serve PORT=<another one>"


@dataclass(frozen=True)
class Refusal:
    """pattern: what docker says. fact and hint may hold {said}, all of it, {detail}, from the pattern on, and what the
    caller of `explained` names."""

    pattern: str
    fact: str
    hint: str


NO_RUNTIME = Refusal(
    "could not select device driver",
    "the docker daemon has no NVIDIA runtime, which GPUs need",
    "install nvidia-container-toolkit and restart docker",
)
DISK_FULL = Refusal("no space left on device", "the disk of the docker daemon is full", "docker system df")
SILENT = Refusal("Cannot connect to the Docker daemon", "no docker daemon answers", START)

# Of a container of ours, by the daemon.
OF_A_JOB = (
    replace(NO_RUNTIME, hint=f"{NO_RUNTIME.hint}, or ask for no GPU: make … DEVICES=-1"),
    Refusal(
        "nvidia-container-cli",
        "the NVIDIA runtime refused the GPUs asked for: {detail}",
        "nvidia-smi -L, then make … with GPUS or DEVICES of those that it lists",
    ),
    replace(
        DISK_FULL,
        fact=f"{DISK_FULL.fact}: {{said}}",
        hint=f"{DISK_FULL.hint}, then docker image rm what you do not need",
    ),
    Refusal(
        "bind source path does not exist",
        "the docker daemon does not see a folder of yours: {detail}",
        ANOTHER_FOLDER,
    ),
    Refusal('error mounting "/', "the docker daemon cannot mount a folder of yours: {detail}", ANOTHER_FOLDER),
)
# Of replicas and their router, by docker compose.
OF_A_DEPLOYMENT = (
    NO_RUNTIME,
    Refusal("port is already allocated", "a port of the router is taken by another container", ANOTHER_PORT),
    Refusal("address already in use", "a port of the router is taken by another program", ANOTHER_PORT),
    DISK_FULL,
    SILENT,
)
# Of an image that comes or goes, by the daemon or the registry, {host}, which has it as {reference}.
OF_A_TRANSFER = (
    Refusal(
        r"connection refused|no such host|i/o timeout|context deadline|network is unreachable|EOF",
        "the registry {host} cannot be reached",
        "check that it runs: curl {host}/v2/",
    ),
    Refusal(
        r"unauthorized|authentication required|no basic auth|denied", "{host} does not let us in", "docker login {host}"
    ),
    Refusal(
        r"verification failed|unexpected commit digest|invalid checksum|does not match",
        "{host} gives other bytes than the digest of {reference} says",
        "make images, or make push REGISTRY=<another one>",
    ),
    Refusal(
        r"not found|manifest unknown|blob unknown|unknown blob",
        "{host} does not have {reference} whole",
        "make images, or make push REGISTRY=<registry>",
    ),
    DISK_FULL,
    Refusal(
        r"HTTP response to HTTPS client",
        "{host} speaks plain HTTP, which docker takes from 127.0.0.1 only",
        'add it to "insecure-registries" in /etc/docker/daemon.json',
    ),
)


def explained(said: str, known: Iterable[Refusal], otherwise: UserError, **words: str) -> UserError:
    """What docker's words mean for the user, by the first of the known refusals; `otherwise` where it is another."""
    for refusal in known:
        if found := re.search(refusal.pattern, said, re.IGNORECASE):
            words |= {"said": said, "detail": said[found.start() :]}
            return UserError(refusal.fact.format(**words), refusal.hint.format(**words))
    return otherwise


def forbidden(where: str, instead: str = WITHOUT) -> UserError:
    hint = "sudo usermod -aG docker $USER, then log in again" + (instead and f"; or {instead}")
    return UserError(f"you may not use the docker daemon at {where}", hint)


def silent(where: str, instead: str = WITHOUT) -> UserError:
    return UserError(f"{SILENT.fact} at {where}", SILENT.hint + (instead and f", or {instead}"))


def refused(said: object, instead: str = WITHOUT) -> UserError:
    """For a reason that nobody foresaw."""
    return UserError(f"the docker daemon refused: {said}", f"docker info, or {instead}")


def gone(error: Exception, then: str = "") -> UserError:
    return UserError(f"the docker daemon is gone: {error}", f"{STATUS}{then}")


def no_image(reference: str) -> UserError:
    """Of an image that a program is to run in."""
    return UserError(f"the image {reference} is not here", "make images, or make pull")


def no_built_image(reference: str) -> UserError:
    """Of an image that is to be read, described or pushed."""
    return UserError(f"there is no image {reference}", "make images")
