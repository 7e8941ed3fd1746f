"""The doctor's checks of docker: daemon, compose, the images, and what a container of ours may see and write."""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from v4forge import pins
from v4forge.errors import UserError
from v4forge.files import make_folder
from v4forge.images import build, containers, definitions, refusals
from v4forge.images.jobs import Job
from v4forge.outcomes import NotChecked, Outcome, failed, ok, warning
from v4forge.pipeline.doctor.host import INSTALL_DOCKER, Host, numbers
from v4forge.serving import compose
from v4forge.units import GIB, counted

API_MIN = (1, 40)  # the first in which a container asks for GPUs
CONTAINER_LIMIT_S = 60.0
TOOLKIT = ("nvidia-ctk", "nvidia-container-runtime-hook", "nvidia-container-cli")
SET_UP_TOOLKIT = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
# Ubuntu has no such package; NVIDIA's repository has. The list names the key as NVIDIA's own instructions do.
REPOSITORY = "https://nvidia.github.io/libnvidia-container"
KEYRING = "/usr/share/keyrings/nvidia-container-toolkit.gpg"
INSTALL_TOOLKIT = (
    f"curl -fsSL {REPOSITORY}/gpgkey | sudo gpg --dearmor --yes -o {KEYRING}"
    f" && echo 'deb [signed-by={KEYRING}] {REPOSITORY}/stable/deb/$(ARCH) /'"
    " | sudo tee /etc/apt/sources.list.d/nvidia-container-toolkit.list"
    f" && sudo apt-get update && sudo apt-get install nvidia-container-toolkit && {SET_UP_TOOLKIT}"
)
# Ubuntu's package, else that of docker's own repository.
INSTALL_COMPOSE = "sudo apt-get install docker-compose-v2 || sudo apt-get install docker-compose-plugin"
INSTALL_BUILDX = "sudo apt-get install docker-buildx || sudo apt-get install docker-buildx-plugin"
# Writes a file where a run would, and says that it could.
WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('x')"


def missing(host: Host, fact: str, fix: str) -> Outcome:
    """What a run in containers cannot do without."""
    return failed(fact, fix) if host.chosen_runtime == "docker" else warning(fact, fix)


def daemon(host: Host) -> Outcome:
    """A docker daemon answers, and its API can give GPUs to a container."""
    try:
        engine = host.engine()
    except UserError as error:
        without = "" if host.chosen_runtime == "docker" else f"; it is not needed for RUNTIME={host.chosen_runtime}"
        return missing(host, error.fact + without, error.hint)
    version = engine.client.version()
    confined = sorted(engine.security & {"rootless", "userns", "selinux"})
    shown = f"docker {version['Version']}, API {version['ApiVersion']}{''.join(f', {name}' for name in confined)}"
    if numbers(version["ApiVersion"]) < API_MIN:
        fact = f"{shown}: GPUs need API {'.'.join(map(str, API_MIN))}"
        return missing(host, fact, "sudo apt-get install --only-upgrade docker.io")
    return ok(shown)


def compose_program(host: Host) -> Outcome:
    """docker compose, which serving in containers needs."""
    for words in compose.PROGRAMS:
        ran = host.command([*words, "version"]) if host.which(words[0]) else None
        if ran and not ran.code:
            version = re.search(r"\d+(\.\d+)+", ran.out)
            return ok(f"{' '.join(words)} {version[0] if version else ''}".strip())
    if not host.which("docker"):
        raise NotChecked("no docker here", INSTALL_DOCKER, "docker")
    return warning("docker compose is not installed: make serve RUNTIME=docker needs it", INSTALL_COMPOSE)


def builder(host: Host) -> Outcome:
    """What `make images` builds with; `make pull` needs none."""
    if not host.which("docker"):
        raise NotChecked("no docker here", INSTALL_DOCKER, "docker")
    try:
        words = build.builder(host.environment)
    except UserError as error:
        return warning(f"{error.fact}: make images needs it", INSTALL_BUILDX)
    return ok(" ".join(["docker", *words[1:3]]) + " builds with BuildKit")


def toolkit(host: Host) -> Outcome:
    """NVIDIA's container toolkit, through which a container gets GPUs."""
    host.some_gpus()
    info = host.some_engine().client.info()
    told = host.command([TOOLKIT[0], "--version"])
    version = re.search(r"\d+(\.\d+)+", told.out) if told else None
    shown = f"NVIDIA's toolkit {version[0]}" if version else "NVIDIA's toolkit"
    if "nvidia" in (info.get("Runtimes") or {}):
        return ok(f"{shown}; the daemon has its runtime")
    if any(map(host.which, TOOLKIT)) or list(host.path("/etc/cdi").glob("*nvidia*")):
        return ok(f"{shown}; the daemon finds it by itself")
    return missing(host, refusals.NO_RUNTIME.fact, INSTALL_TOOLKIT)


def _give_gpus(host: Host) -> str:
    """What makes a container see the GPUs: the toolkit, or its settings where it is installed."""
    return SET_UP_TOOLKIT if host.which(TOOLKIT[0]) else INSTALL_TOOLKIT


def image(host: Host, name: str) -> Outcome:
    """An image is here, and holds this checkout's code."""
    engine, reference = host.some_engine(), definitions.resolve(name)
    labels = _labels(host, name)
    lane = labels.get(containers.LANE_LABEL, "")
    if labels.get(containers.CODE_LABEL) != definitions.code_sha256():
        fact = f"{reference} holds other code than this checkout"
        return (
            missing(host, fact, f"make images IMAGE={name}")
            if name == "calib"
            else warning(fact, f"make images IMAGE={name}")
        )
    if name == "calib" and lane == "cpu" and host.full_size:
        return missing(host, f"{reference} is of the CPU's lane", "make images IMAGE=calib LANE=cuda")
    found = engine.client.images.get(reference)
    return ok(f"{reference}, lane {lane}, {found.attrs.get('Size', 0) / GIB:.1f} GiB")


def _labels(host: Host, name: str) -> dict[str, str]:
    """The labels of an image. Raises NotChecked where it is not here."""
    reference = definitions.resolve(name)
    try:
        return containers.labels(host.some_engine(), reference)
    except UserError:
        get = "make pull" if definitions.locked().get(f"{name.upper()}_IMAGE") else f"make images IMAGE={name}"
        raise NotChecked(f"the image {reference} is not here", get) from None


def _output(host: Host, name: str, command: list[str], gpus: int = 0) -> tuple[int, str]:
    """Runs a command in an image as a stage would be, with the work folder."""
    _labels(host, name)
    job = Job(image=definitions.resolve(name), command=command, work=_made(host.work), gpus=gpus)
    return containers.output(host.some_engine(), job, CONTAINER_LIMIT_S)


def _made(work: Path) -> Path:
    """The work folder, made where it was not. Raises NotChecked where it cannot be: the check of it says why."""
    try:
        make_folder(work)
    except UserError as error:
        raise NotChecked(error.fact, error.hint, "scratch") from None
    return work


def sees_gpus(host: Host) -> Outcome:
    """A container of the calibration image sees the GPUs."""
    found = host.some_gpus()
    try:
        code, said = _output(host, "calib", ["nvidia-smi", "-L"], min(host.gpus_wanted, len(found)))
    except UserError as error:
        return missing(host, error.fact, _give_gpus(host) if "NVIDIA" in error.fact else error.hint)
    seen = len(re.findall(r"^GPU \d+:", said, flags=re.M))
    if code or seen < host.gpus_wanted:
        first = next(iter(said.strip().splitlines()), "nothing")
        return missing(host, f"a container sees {seen} GPUs, GPUS={host.gpus_wanted}: {first}", _give_gpus(host))
    return ok(f"a container sees {counted(seen, 'GPUs')}")


def writes(host: Host) -> Outcome:
    """A container writes to the work folder, and what it writes is ours."""
    work = _made(host.work)
    file = work / f".doctor-{secrets.token_hex(4)}"
    try:
        code, said = _output(host, "calib", ["python", "-c", WRITE, str(file)])
        own = f"sudo chown -R $(id -u):$(id -g) {work}"
        if code:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            return missing(host, f"a container cannot write to {work}: {last}", own)
        if not file.exists():
            fact = f"the daemon's {work} is another one: does it run on this machine?"
            named = host.environment.get("DOCKER_HOST")
            return missing(host, fact, "unset DOCKER_HOST" if named else host.make("doctor", "RUNTIME=host"))
        if (owner := file.stat().st_uid) != host.user:
            return missing(host, f"what a container writes to {work} belongs to user {owner}, not to you", own)
    finally:
        with suppress(OSError):
            file.unlink()
    return ok(f"a container writes to {work} as you, user {host.user}")


def compiler(host: Host) -> Outcome:
    """The serve image has the compilers of what DeepGEMM and Triton compile at run time."""
    wanted = numbers(pins.read()["CUDA_TOOLKIT_VERSION"])[:2]
    code, said = _output(host, "serve", ["sh", "-c", "nvcc --version && g++ --version"])
    release = re.search(r"release (\d+)\.(\d+)", said)
    rebuild = "make images IMAGE=serve"
    if code or not release:
        lacks = "g++" if release else "nvcc"
        return missing(host, f"the serve image has no {lacks}: DeepGEMM compiles when it first runs", rebuild)
    found = tuple(map(int, release.groups()))
    shown = ".".join(map(str, found))
    if found != wanted:
        return missing(host, f"the serve image's nvcc is {shown}, versions.env has {wanted[0]}.{wanted[1]}", rebuild)
    return ok(f"nvcc {shown} and g++ in the serve image")


def data_folder(host: Host) -> tuple[Path, int]:
    """Where the daemon keeps images, and the bytes that those of ours that are not here may take, by their budgets."""
    info: dict[str, Any] = host.some_engine().client.info()
    missing_bytes = 0
    for image in definitions.IMAGES.values():
        try:
            _labels(host, image.name)
        except NotChecked:
            missing_bytes += int(image.lanes[build.default_lane(image)] * GIB)
    return host.path(info.get("DockerRootDir") or "/var/lib/docker"), missing_bytes
