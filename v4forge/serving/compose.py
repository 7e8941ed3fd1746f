"""A deployment in containers: compose.yaml with the deployment's values."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from v4forge import pins
from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.files import write_text
from v4forge.images import refusals
from v4forge.serving.deployment import METRICS, ROUTER, Deployment, Process

FILE, LIMITS = ROOT / "compose.yaml", ROOT / "compose.limits.yaml"
PAIR = 2
MOST = 4
# Whom a caller who is root runs it as: the image's own user.
USER = 10000
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
        self.files = [FILE, LIMITS, *map(Path, deployment.compose)]

    @property
    def project(self) -> str:
        return f"v4forge-{self.deployment.port}"

    def variables(self) -> dict[str, str]:
        """The variables of compose.yaml. Raises UserError for what it cannot express."""
        deployment = self.deployment
        if deployment.replicas > MOST:
            fact = f"compose.yaml has {MOST} replicas, not {deployment.replicas}"
            raise UserError(fact, f"make serve REPLICAS={MOST}")
        values = {
            "COMPOSE_PROJECT_NAME": self.project,
            "SERVE_IMAGE": deployment.image,
            "SERVE_USER": f"{os.getuid()}:{os.getgid()}" if os.getuid() else f"{USER}:{USER}",
            "SERVE_FOLDER": deployment.folder,
            "ARTIFACT": deployment.artifact,
            "REPLICA_ARGUMENTS": " ".join(deployment.arguments(0)),
            "API_KEY_FILE": deployment.key_file or os.devnull,
            "BIND": deployment.bind,
            "PORT": str(deployment.port),
            "ADMIN_PORT": str(deployment.port + 1),
            **{key: pins.read()[key] for key in ("PROMETHEUS_IMAGE", "GRAFANA_IMAGE")},
        }
        for number, devices in enumerate(deployment.gpus):
            if deployment.backend == "cuda" and len(devices) != PAIR:
                hint = "make serve TP=2, or without docker: RUNTIME=host"
                raise UserError(f"compose.yaml gives a replica {PAIR} GPUs, not {len(devices)}", hint)
            values |= {f"REPLICA{number}_GPU{place}": device for place, device in enumerate(devices)}
        return values

    def write(self) -> None:
        lines = [f"{name}={value}\n" for name, value in self.deployment.variables(0).items()]
        write_text(Path(self.deployment.folder) / "replica.env", "".join(lines))
        if self.deployment.key_file and not os.getuid():
            os.chown(self.deployment.key_file, USER, USER)

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
        profiles = [f"replicas-{self.deployment.replicas}", *(["metrics"] if self.deployment.metrics else [])]
        files = [word for file in self.files for word in ("--file", str(file))]
        return [*program(), *files, *(f"--profile={name}" for name in profiles), *words]

    def start(self) -> None:
        words = ("up", "--detach", "--no-build", "--remove-orphans")
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
                found[name] = Process(STATES.get(state["Status"], state["Status"]), state["StartedAt"])
        return found

    def log(self, name: str) -> str:
        # Docker's own command: compose's takes a second to start, and this is asked for again and again.
        words = [["docker", "logs", container] for container in self._containers(name)]
        told = [subprocess.run(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for each in words]
        return "".join(each.stdout for each in told)

    def _containers(self, service: str = "") -> list[str]:
        """The ids of the project's containers, or of one service's, those that have ended too."""
        labels = [f"project={self.project}", *([f"service={service}"] if service else [])]
        filters = [f"--filter=label=com.docker.compose.{label}" for label in labels]
        return subprocess.run(
            ["docker", "ps", "--all", "--quiet", *filters], capture_output=True, text=True
        ).stdout.split()

    def follow(self, names: Sequence[str], lines: int) -> NoReturn:
        words = self.command("logs", "--follow", f"--tail={lines}", *names)
        os.execvpe(words[0], words, self._environment())

    def stop(self, say: Callable[[str], None], silent: Sequence[str] = ()) -> None:
        # The router gets SIGUSR1, ends when its last answer has, and is not started again.
        self._run("stop", f"--timeout={self.deployment.drain_s}", ROUTER)
        say("serve: no request is left, stopping the replicas")
        if silent:
            self._run("kill", *silent)  # which starts nothing again
        self._run("down", "--timeout=60")

    def _environment(self) -> dict[str, str]:
        return os.environ | self.variables()

    def _run(self, *words: str) -> None:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, env=self._environment())
        if done.returncode:
            raise _explained(done.stdout + done.stderr)


def _explained(said: str) -> UserError:
    last = " ".join(said.strip().splitlines()[-2:]) or "it said nothing"
    otherwise = UserError(f"docker compose failed: {last}", "docker ps --all, docker logs <container>")
    return refusals.explained(said, refusals.OF_A_DEPLOYMENT, otherwise)
