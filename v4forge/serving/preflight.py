"""The guards: what has to hold before replicas are started."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from v4forge import certified, gpus, pins
from v4forge.contents import Steps, silent
from v4forge.errors import UserError
from v4forge.gpus import BLACKWELL, HOPPER, IDLE_BYTES, SMI_HINT, Gpu, Process
from v4forge.serving.deployment import Deployment
from v4forge.serving.settings import WIDTHS
from v4forge.units import GIB

LOOPBACK = re.compile(r"127(\.\d+){3}|::1|localhost")


@dataclass(frozen=True)
class Proof:
    """What is asked of the artifact: `level`, one of certified.LEVELS, and the public key that must have signed its
    certificate; `steps` shows how far the reading is."""

    level: str = certified.CONTENTS
    key: Path | None = None
    steps: Steps = silent


def check_certificate(deployment: Deployment, proof: Proof) -> None:
    """Raises UserError unless the folder is the artifact that verify has passed."""
    artifact = Path(deployment.artifact)
    if not os.path.isfile(artifact / "config.json"):
        raise UserError(f"there is no artifact in {artifact}", "make artifact, or make serve ARTIFACT=<folder>")
    try:
        certified.check(
            artifact, f"python -m scripts.verify --artifact {artifact}", proof.level, proof.key, proof.steps
        )
    except UserError as error:
        hint = f"{error.hint}, or serve it all the same: make serve ALLOW=certificate"
        raise UserError(error.fact, hint) from None


def check_gpus(deployment: Deployment) -> None:
    """Raises UserError unless the GPUs of the deployment can hold and run the artifact."""
    if deployment.backend != "cuda":
        return
    chosen = {device for devices in deployment.gpus for device in devices}
    found = [gpu for gpu in gpus.gpus() if chosen & {gpu.uuid, str(gpu.index)}]
    if absent := sorted(chosen - {name for gpu in found for name in (gpu.uuid, str(gpu.index))}):
        raise UserError(f"there is no GPU {absent[0]}", "nvidia-smi -L lists them; make serve DEVICES=<some of them>")
    shards = [path for path in Path(deployment.artifact).glob("*.safetensors") if path.is_file()]
    size = sum(path.stat().st_size for path in shards)
    share = deployment.serving.memory_share
    minimum = pins.read()["CUDA_DRIVER_MIN"]
    programs = gpus.processes()
    for line in check_can_serve(
        found, deployment.serving.tensor_parallel, size, share, minimum, programs, deployment.replicas
    ):
        print(f"serve: {line}", flush=True)


def check_can_serve(
    chosen: Sequence[Gpu],
    tensor_parallel: int,
    artifact_bytes: int,
    memory_utilization: float,
    driver_min: str,
    programs: Sequence[Process] = (),
    replicas: int = 1,
) -> list[str]:
    """What may be wrong with serving on these GPUs, a line each. Raises UserError for what is.

    chosen: the ones to serve on; driver_min: CUDA_DRIVER_MIN of versions.env; programs: what gpus.processes found.
    """
    needed = tensor_parallel * replicas
    if len(chosen) < needed:
        fewer = len(chosen) // tensor_parallel
        raise UserError(
            f"{replicas} replicas of {tensor_parallel} GPUs need {needed}, there are {len(chosen)}",
            f"make serve REPLICAS={fewer}" if fewer else "serve on a machine with more GPUs: nvidia-smi -L lists them",
        )
    for gpu in chosen:
        if gpu.sliced:
            raise UserError(f"{gpu} is sliced by MIG", f"sudo nvidia-smi -i {gpu.index} -mig 0; DEVICES= leaves it out")
        if gpu.compute < HOPPER:
            raise UserError(
                f"{gpu} has compute capability {_dotted(gpu.compute)}; DeepGEMM and FP8 by blocks need"
                f" {_dotted(HOPPER)}, Hopper",
                "serve on H100, H200 or newer; DEVICES= leaves a GPU out",
            )
        if _version(gpu.driver) < _version(driver_min):
            raise UserError(
                f"the NVIDIA driver is {gpu.driver}; the image's CUDA needs {driver_min} or newer",
                f"install driver {driver_min} or newer and restart the machine; nvidia-smi shows it",
            )
    room = min(gpu.memory_bytes for gpu in chosen) * memory_utilization
    if room * tensor_parallel < artifact_bytes:
        more = [n for n in WIDTHS if tensor_parallel < n <= len(chosen)]
        enough = next((n for n in more if room * n >= artifact_bytes), 0)
        raise UserError(
            f"the artifact is {_gib(artifact_bytes)}; {tensor_parallel} of these GPUs hold"
            f" {_gib(room * tensor_parallel)} at a memory utilization of {memory_utilization:.2f}",
            f"make serve TP={enough}" if enough else "serve on more of these GPUs, or on ones with more memory",
        )
    for gpu in chosen:
        if gpu.used_bytes > IDLE_BYTES:
            names = [f"{each.name} (process {each.pid})" for each in programs if each.uuid == gpu.uuid]
            by = ", ".join(names) or "a program that nvidia-smi does not list"
            raise UserError(
                f"{gpu} is in use: {_gib(gpu.used_bytes)} by {by}",
                "end it, or leave the GPU out with DEVICES=; replicas of ours: make serve-stop",
            )
    newer = [str(gpu) for gpu in chosen if gpu.compute >= BLACKWELL]
    return [f"not verified on compute capability {_dotted(BLACKWELL)} and newer: {', '.join(newer)}"] if newer else []


def _version(text: str) -> tuple[int, ...]:
    """Its numbers. Raises UserError for a driver that does not tell its version."""
    if not re.fullmatch(r"\d+(\.\d+)*", text):
        raise UserError(f"NVML says that the driver's version is {text!r}", SMI_HINT)
    return tuple(map(int, text.split(".")))


def _dotted(compute: tuple[int, int]) -> str:
    return f"{compute[0]}.{compute[1]}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def check_ports(deployment: Deployment) -> None:
    """Raises UserError for an address that is not this machine's, or a port on it that another program has."""
    for address, port in deployment.ports():
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} on {address} is taken", f"make serve PORT={deployment.port + 100}"
                ) from None
            raise UserError(f"cannot listen on {address}:{port}: {error.strerror}", "make serve BIND=0.0.0.0") from None
        except OverflowError:
            raise UserError(f"{port} is no port", "make serve PORT=8000") from None


def check_open(deployment: Deployment) -> None:
    """Raises UserError for an endpoint that others than this machine reach and that asks for no key."""
    if deployment.key_file or LOOPBACK.fullmatch(deployment.bind):
        return
    fact = f"the endpoint would listen on {deployment.bind} and ask nobody for a key"
    raise UserError(fact, f"make serve BIND={deployment.bind} API_KEY_FILE=<file>, or ALLOW=open")


@dataclass(frozen=True)
class Check:
    """`name` is what ALLOW takes to leave it out."""

    name: str
    function: Callable[[Deployment, Proof], None]


CERTIFICATE = Check("certificate", check_certificate)
GUARDS = (
    CERTIFICATE,
    Check("gpu", lambda deployment, _: check_gpus(deployment)),
    Check("open", lambda deployment, _: check_open(deployment)),
    Check("ports", lambda deployment, _: check_ports(deployment)),
)
EVERY_BYTE = Proof()


def check(
    deployment: Deployment,
    allowed: Iterable[str],
    say: Callable[[str], None],
    proof: Proof = EVERY_BYTE,
    guards: Sequence[Check] = GUARDS,
) -> None:
    """Runs every guard, or those given; one that is allowed to fail says what it found, the certificate's
    by names and sizes."""
    if "certificate" in allowed:
        proof = replace(proof, level=certified.SIZES)
    for guard in guards:
        try:
            guard.function(deployment, proof)
        except UserError as error:
            if guard.name not in allowed:
                raise
            say(f"serve: allowed by ALLOW={guard.name}: {error.fact}")
