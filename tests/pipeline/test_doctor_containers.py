"""The doctor's checks of docker, with a stand-in for the daemon and stubs for its programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker_stand_in import Daemon, running
from doctored import Machine, says, statvfs

from v4forge import pins
from v4forge.errors import UserError
from v4forge.images import containers, definitions
from v4forge.outcomes import FAILED, OK, WARNING, NotChecked
from v4forge.pipeline.doctor import containers as doctor_containers
from v4forge.pipeline.doctor import disk
from v4forge.pipeline.doctor.host import Host

CODE = "0123"  # the checkout's, whatever it is
CALIB, SERVE = definitions.tag("calib"), definitions.tag("serve")
GB = 10**9


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setattr(definitions, "code_sha256", lambda: CODE)
    labels = {"io.v4forge.code": CODE, "io.v4forge.lane": "cuda"}
    with running(Daemon(images={CALIB: labels, SERVE: labels | {"io.v4forge.lane": "wheel"}})) as found:
        yield found


def host(machine: Machine, daemon: Daemon, profile: str = "flash", **values: Any) -> Host:
    return machine.host(profile, {"DOCKER_HOST": daemon.url}, **values)


def test_a_daemon_that_answers(machine: Machine, daemon: Daemon) -> None:
    says(doctor_containers.daemon(host(machine, daemon)), OK, "docker 28.0, API 1.44")


def test_a_daemon_that_is_rootless_says_so(machine: Machine, daemon: Daemon) -> None:
    daemon.info["SecurityOptions"] = ["name=seccomp,profile=builtin", "name=rootless"]
    says(doctor_containers.daemon(host(machine, daemon)), OK, "rootless")


def test_a_daemon_that_is_too_old_for_gpus(machine: Machine, daemon: Daemon) -> None:
    daemon.api = "1.38"
    says(doctor_containers.daemon(host(machine, daemon)), FAILED, "GPUs need API 1.40", "docker.io")


def test_no_docker_fails_only_a_run_in_containers(machine: Machine) -> None:
    says(doctor_containers.daemon(machine.host(runtime="docker")), FAILED, "docker is not installed", "apt-get install")
    says(doctor_containers.daemon(machine.host(runtime="host")), WARNING, "not needed for RUNTIME=host")


def test_a_daemon_that_does_not_answer(machine: Machine, daemon: Daemon) -> None:
    gone = machine.host(environment={"DOCKER_HOST": "tcp://127.0.0.1:9"})
    says(doctor_containers.daemon(gone), FAILED, "no docker daemon answers", "unset DOCKER_HOST")
    with pytest.raises(NotChecked, match="no docker daemon answers here, see docker"):
        doctor_containers.sees_gpus(gone)


@pytest.mark.parametrize(
    ("fact", "fix"),
    [
        ("no docker daemon answers at docker's usual socket", "sudo systemctl enable --now docker"),
        (
            "you may not use the docker daemon at docker's usual socket",
            "sudo usermod -aG docker $USER && newgrp docker",
        ),
    ],
)
def test_a_daemon_that_is_not_ours_to_use_yet(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, fact: str, fix: str
) -> None:
    def connect(_environment: object) -> None:
        raise UserError(fact, "one thing, or another")

    monkeypatch.setattr(containers, "connect", connect)
    machine.program("docker", "")
    found = doctor_containers.daemon(machine.host())
    says(found, FAILED, fact)
    assert found.fix == fix


def test_compose_by_either_name(machine: Machine) -> None:
    machine.program("docker", "exit 1")
    says(doctor_containers.compose_program(machine.host()), WARNING, "compose is not installed", "docker-compose-v2")
    machine.program("docker-compose", 'echo "docker-compose version 1.29.2, build unknown"')
    says(doctor_containers.compose_program(machine.host()), OK, "docker-compose 1.29.2")
    machine.program("docker", 'echo "Docker Compose version v2.39.1"')
    says(doctor_containers.compose_program(machine.host()), OK, "docker compose 2.39.1")


def test_a_docker_that_builds(machine: Machine) -> None:
    machine.program("docker", '[ "$1" = --version ] && echo "Docker version 28.2.2, build x"; [ "$1" != buildx ]')
    says(doctor_containers.builder(machine.host()), WARNING, "cannot build with BuildKit", "docker-buildx")
    machine.program("docker", "exit 0")
    says(doctor_containers.builder(machine.host()), OK, "docker buildx build")


def test_the_daemon_has_nvidias_runtime(machine: Machine, daemon: Daemon) -> None:
    says(doctor_containers.toolkit(host(machine, daemon)), FAILED, "no NVIDIA runtime", "nvidia-container-toolkit")
    machine.program("nvidia-ctk", 'echo "NVIDIA Container Toolkit CLI version 1.17.8"')
    says(doctor_containers.toolkit(host(machine, daemon)), OK, "toolkit 1.17.8; the daemon finds it")
    daemon.info["Runtimes"]["nvidia"] = {}
    says(doctor_containers.toolkit(host(machine, daemon)), OK, "the daemon has its runtime")


def test_images_of_this_checkout(machine: Machine, daemon: Daemon) -> None:
    says(doctor_containers.image(host(machine, daemon), "calib"), OK, "lane cuda, 1.0 GiB")
    daemon.images[CALIB] = {"io.v4forge.code": "0"}
    says(doctor_containers.image(host(machine, daemon), "calib"), FAILED, "holds other code", "make images IMAGE=calib")
    daemon.images[CALIB] = {"io.v4forge.code": CODE, "io.v4forge.lane": "cpu"}
    says(doctor_containers.image(host(machine, daemon), "calib"), FAILED, "the CPU's lane", "LANE=cuda")
    del daemon.images[CALIB]
    with pytest.raises(NotChecked, match=f"{CALIB} is not here"):
        doctor_containers.image(host(machine, daemon), "calib")


def test_a_container_sees_the_gpus(machine: Machine, daemon: Daemon) -> None:
    daemon.programs["nvidia-smi"] = lambda _: (
        0,
        "GPU 0: NVIDIA H200 (UUID: GPU-0)\nGPU 1: NVIDIA H200 (UUID: GPU-1)\n",
    )
    says(doctor_containers.sees_gpus(host(machine, daemon, gpus_wanted=2)), OK, "sees 2 GPUs")
    assert daemon.created[0]["HostConfig"]["DeviceRequests"][0]["Count"] == 2
    assert daemon.removed == [0]


def test_a_container_that_sees_no_gpu(machine: Machine, daemon: Daemon) -> None:
    daemon.programs["nvidia-smi"] = lambda _: (127, "nvidia-smi: not found\n")
    found = doctor_containers.sees_gpus(host(machine, daemon))
    says(found, FAILED, "sees 0 GPUs, GPUS=1: nvidia-smi: not found", "apt-get install nvidia-container-toolkit")


def test_a_daemon_without_the_runtime_refuses_and_leaves_no_container(machine: Machine, daemon: Daemon) -> None:
    daemon.refusal = 'could not select device driver "" with capabilities: [[gpu]]'
    says(doctor_containers.sees_gpus(host(machine, daemon)), FAILED, "no NVIDIA runtime", "libnvidia-container")
    assert daemon.removed == [0]
    machine.program("nvidia-ctk", "")
    found = doctor_containers.sees_gpus(host(machine, daemon))
    assert found.fix == "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"


def test_what_a_container_writes_is_ours(machine: Machine, daemon: Daemon) -> None:
    def write(made: dict[str, Any]) -> tuple[int, str]:
        Path(made["Cmd"][-1]).write_text("x")
        return 0, ""

    daemon.programs["python"] = write
    says(doctor_containers.writes(host(machine, daemon)), OK, "as you")
    says(doctor_containers.writes(host(machine, daemon, user=12345)), FAILED, "not to you", "sudo chown -R")
    assert list(machine.work.iterdir()) == []


def test_a_container_that_cannot_write(machine: Machine, daemon: Daemon) -> None:
    daemon.programs["python"] = lambda _: (1, "Traceback\nPermissionError: [Errno 13] Permission denied\n")
    says(doctor_containers.writes(host(machine, daemon)), FAILED, "cannot write", "sudo chown -R")


def test_a_daemon_of_another_machine(machine: Machine, daemon: Daemon) -> None:
    daemon.programs["python"] = lambda _: (0, "")
    says(doctor_containers.writes(host(machine, daemon)), FAILED, "does it run on this machine?", "unset DOCKER_HOST")


def test_the_serve_image_has_its_compilers(machine: Machine, daemon: Daemon) -> None:
    release = ".".join(pins.read()["CUDA_TOOLKIT_VERSION"].split(".")[:2])
    for said, code, status in (
        (f"Cuda compilation tools, release {release}, V{release}.1\ng++ 13", 0, OK),
        ("sh: 1: nvcc: not found", 127, FAILED),
        ("Cuda compilation tools, release 12.1, V12.1.105\ng++ 13", 0, FAILED),
        (f"Cuda compilation tools, release {release}, V{release}.1\nsh: g++: not found", 127, FAILED),
    ):
        daemon.programs["sh"] = lambda _, code=code, said=said: (code, said)
        assert doctor_containers.compiler(host(machine, daemon)).status == status, said


def test_images_that_are_not_here_have_to_fit(machine: Machine, daemon: Daemon) -> None:
    folder = machine.root / "var/lib/docker"
    with pytest.raises(NotChecked, match="which this machine does not have"):
        disk.images(host(machine, daemon))
    folder.mkdir(parents=True)
    says(disk.images(host(machine, daemon)), OK, "both images are here")
    daemon.images.clear()
    says(disk.images(host(machine, daemon, statvfs=statvfs(100 * GB))), OK, "may take")
    short = disk.images(host(machine, daemon, statvfs=statvfs(2 * GB)))
    says(short, FAILED, "are missing", "docker system prune")
