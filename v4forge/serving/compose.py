"""A deployment in containers: compose.yaml with the deployment's values."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from v4forge import pins
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.files import write_text
from v4forge.images import refusals
from v4forge.serving import router_control
from v4forge.serving.deployment import METRICS, ROUTER, USER, Deployment, Process

FILE, LIMITS = ROOT / "compose.yaml", ROOT / "compose.limits.yaml"
# What each replica has besides, on top of compose.yaml.
REPLICAS = "replicas.yaml"
MOST = 8
GRACE_S = 60  # from the signal that ends a replica to the kill
FOLDER_LABEL = "v4forge.folder"
# Of docker-compose ps and inspect -> ours.
STATES = {"created": "starting", "restarting": "exited", "dead": "exited", "removing": "exited"}


# docker's plugin, or the docker-compose of before.
PROGRAMS = (("docker", "compose"), ("docker-compose",))
INSTALL = "apt-get install docker-compose-plugin, or docker-compose"


@functools.lru_cache(maxsize=1)
def program() -> tuple[str, ...]:
    """The one of PROGRAMS that is here. Raises UserError where neither is installed."""
    for words in PROGRAMS:
        if shutil.which(words[0]) and not subprocess.run([*words, "version"], capture_output=True).returncode:
            return words
    raise UserError("docker compose is not installed", INSTALL)


class Compose:
    """Docker compose keeps the processes of a deployment: a Runtime."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.files = [FILE, LIMITS, Path(deployment.folder) / REPLICAS, *map(Path, deployment.compose)]

    @property
    def project(self) -> str:
        return f"v4forge-{self.deployment.port}"

    @property
    def label(self) -> str:
        """What all of the deployment has, for docker's filters; by its folder where its port is not known."""
        if not self.deployment.port:
            return f"{FOLDER_LABEL}={self.deployment.folder}"
        return f"com.docker.compose.project={self.project}"

    def variables(self) -> dict[str, str]:
        """The variables of compose.yaml."""
        deployment = self.deployment
        return {
            "COMPOSE_PROJECT_NAME": self.project,
            "SERVE_IMAGE": deployment.image_id or deployment.image,
            "SERVE_USER": f"{os.getuid()}:{os.getgid()}" if os.getuid() else f"{USER}:{USER}",
            "SERVE_FOLDER": deployment.folder,
            "ARTIFACT": deployment.artifact,
            "BIND": deployment.listens,
            "PORT": str(deployment.port),
            "ADMIN_PORT": str(deployment.port + 1),
            **{key: pins.read()[key] for key in ("PROMETHEUS_IMAGE", "GRAFANA_IMAGE")},
        }

    def replicas(self) -> str:
        """Each replica's arguments, groups and GPUs as a compose file: JSON, which is YAML too."""
        services: dict[str, dict[str, Any]] = {}
        # What the caller may read by a group, the containers have to as well.
        groups = [str(group) for group in sorted(set(os.getgroups()) - {os.getgid()})] if os.getuid() else []
        for number, devices in enumerate(self.deployment.gpus):
            words = [word.replace("$", "$$") for word in self.deployment.arguments(number)]
            service: dict[str, Any] = {"command": words}
            services[self.deployment.names[number]] = service
            if groups:
                service["group_add"] = groups
            if devices:
                asked = {"driver": "nvidia", "capabilities": ["gpu"], "device_ids": list(devices)}
                service["deploy"] = {"resources": {"reservations": {"devices": [asked]}}}
        return json.dumps({"services": services}, indent=1) + "\n"

    def check(self) -> None:
        """Raises UserError for more replicas than compose.yaml has."""
        if self.deployment.replicas > MOST:
            fact = f"compose.yaml has {MOST} replicas, not {self.deployment.replicas}"
            raise UserError(fact, f"make serve REPLICAS={MOST}")
        self.replicas()

    def write(self) -> None:
        """Writes what compose reads besides compose.yaml. Raises UserError where it does not take all that."""
        folder = Path(self.deployment.folder)
        lines = [f"{name}={value}\n" for name, value in self.deployment.variables(0).items()]
        write_text(folder / "replica.env", "".join(lines))
        write_text(folder / REPLICAS, self.replicas())
        self._run("config", "--quiet")

    def check_readable(self) -> None:
        """Raises UserError for an artifact that the image's user may not read, where a replica runs as that, and for
        files that links lead to outside of the folder, which is all that a container sees."""
        artifact = Path(self.deployment.artifact)
        there = [path for path in (artifact, *sorted(artifact.iterdir())) if path.exists()]
        for path in there:
            if not path.resolve().is_relative_to(artifact.resolve()):
                fact = f"{path} is a link to {path.resolve()}, which containers do not see"
                raise UserError(fact, f"cp -rL {artifact} <folder>, or make serve RUNTIME=host")
        closed = [path for path in there if not path.stat().st_mode & 0o004]
        if closed and not os.getuid():
            fact = f"you are root and the replicas are user {USER}, who may not read {closed[0]}"
            raise UserError(fact, f"chmod -R go+rX {artifact}, or make serve as another user")

    def command(self, *words: str) -> list[str]:
        profiles = [*self.deployment.names, *(["metrics"] if self.deployment.metrics else [])]
        files = [word for file in self.files for word in ("--file", str(file))]
        return [*program(), *files, *(f"--profile={name}" for name in profiles), *words]

    def start(self) -> None:
        # By name, where some run: of all, compose replaces each whose image or values it takes for others now.
        states = {name: process.state for name, process in self.processes().items()}
        if "running" not in states.values():
            self._up("--remove-orphans")
        elif down := [name for name, state in states.items() if state != "running"]:
            self._up("--no-deps", *down)

    def replace(self, name: str) -> None:
        self.write()
        # Not compose's own way, which would leave two of them to who is killed in between.
        self._stop(name, GRACE_S)
        self._remove(name)
        self._up("--no-deps", name)

    def _up(self, *options: str) -> None:
        words = ("up", "--detach", "--no-build", *options)
        try:
            self._run(*words)
        except UserError as error:
            if "rlimit" not in error.fact:
                raise
            self.files.remove(LIMITS)  # a daemon without the right to raise limits
            self._run(*words)

    def processes(self) -> Mapping[str, Process]:
        wanted = [*self.deployment.names, ROUTER, *(METRICS if self.deployment.metrics else ())]
        found = dict.fromkeys(wanted, Process())
        if listed := self._containers():
            seen = subprocess.run(["docker", "inspect", *listed], capture_output=True, text=True).stdout
            for container in json.loads(seen or "[]"):
                name = container["Config"]["Labels"]["com.docker.compose.service"]
                state = container["State"]
                run = "" if state["Status"] == "created" else state["StartedAt"]
                found[name] = Process(STATES.get(state["Status"], state["Status"]), run)
        return found

    def log(self, name: str) -> str:
        # Docker's own command: compose's takes a second to start, and this is asked for again and again.
        words = [["docker", "logs", container] for container in self._containers(name)]
        told = [subprocess.run(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for each in words]
        return "".join(each.stdout for each in told)

    def _containers(self, service: str = "") -> list[str]:
        """The ids of the deployment's containers, or of one service's, those that have ended too; none while the
        daemon is silent."""
        return _docker("ps", "--all", "--quiet", *self._filters(service)).stdout.split()

    def _filters(self, service: str = "") -> list[str]:
        labels = [self.label, *([f"com.docker.compose.service={service}"] if service else [])]
        return [f"--filter=label={label}" for label in labels]

    def follow(self, names: Sequence[str], lines: int) -> NoReturn:
        words = self.command("logs", "--follow", f"--tail={lines}", *names)
        os.execvpe(words[0], words, self._environment())

    def reload(self) -> None:
        found = _told("ps", "--quiet", *self._filters(ROUTER)).split()
        if not found:
            raise UserError("the router does not run", "make serve-status")
        with router_control.reloading(self.deployment):
            _told("kill", "--signal=USR2", *found)

    def stop(self, say: Callable[[str], None], silent: Sequence[str] = ()) -> None:
        # Docker's own commands by a label: compose's want every value of compose.yaml, which a damaged plan has not.
        # The router gets SIGUSR1, ends when its last answer has, and is not started again.
        self._stop(ROUTER, self.deployment.drain_s)
        say("serve: no request is left, stopping the replicas")
        for name in silent:
            self._stop(name, 0)
        self._stop("", GRACE_S)
        self._remove("")
        if found := _told("network", "ls", "--quiet", *self._filters()).split():
            _told("network", "rm", *found)

    def _stop(self, service: str, seconds: int) -> None:
        """Stops a service, or with "" all; who does not end within `seconds` is killed."""
        if found := _told("ps", "--all", "--quiet", *self._filters(service)).split():
            _told("stop", "-t", str(seconds), *found)

    def _remove(self, service: str) -> None:
        if found := _told("ps", "--all", "--quiet", *self._filters(service)).split():
            _told("rm", "--force", *found)

    def _environment(self) -> dict[str, str]:
        return os.environ | self.variables()

    def _run(self, *words: str) -> None:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, env=self._environment())
        if done.returncode:
            raise _explained(done.stdout + done.stderr)


def _docker(*words: str) -> subprocess.CompletedProcess[str]:
    """A docker command's end. Raises UserError where docker is not installed."""
    try:
        return subprocess.run(["docker", *words], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("docker is not installed", refusals.INSTALL) from None


def _told(*words: str) -> str:
    """What a docker command prints. Raises UserError where it fails."""
    done = _docker(*words)
    if done.returncode:
        raise _explained(done.stdout + done.stderr)
    return done.stdout


def _explained(said: str) -> UserError:
    last = " ".join(said.strip().splitlines()[-2:]) or "it said nothing"
    otherwise = UserError(f"docker failed: {last}", "docker ps --all, docker logs <container>")
    return refusals.explained(said, refusals.OF_A_DEPLOYMENT, otherwise)
