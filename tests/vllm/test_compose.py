"""compose.yaml with a real docker: replicas of a real vLLM on the CPU in containers, and a stub NVIDIA hook that shows
which GPUs each of them would get."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from served import ROOT, SERVE_ENVIRONMENT, dense_settings, wait_until

from v4forge.images import base, containers, definitions
from v4forge.serving.compose import Compose
from v4forge.serving.deployment import Deployment

pytestmark = [pytest.mark.serve, pytest.mark.soak, pytest.mark.timeout(900)]

# The serve image but for vLLM, which is the CPU's, mounted with its interpreter.
IMAGE = """
FROM {base}
RUN apt-get update -qq && apt-get install -qq --no-install-recommends \\
    g++ haproxy libc6-dev libgomp1 libnuma1 python3 python3-dev >/dev/null
RUN ln -s /usr/bin/python3 /usr/local/bin/python && mkdir -m 1777 /cache /home/v4forge && chmod 755 /root
COPY health replica watchdog.py /usr/local/bin/
ENV HOME=/home/v4forge USER=v4forge LOGNAME=v4forge
USER 10000:10000
"""
MOUNTS = """
services:
  replica0: &more
    volumes: ["{environment}:{environment}:ro", "{python}:{python}:ro", "{patches}:{patches}:ro"]
    environment: {{PATH: "{environment}/bin:/usr/local/bin:/usr/bin:/bin", PYTHONDONTWRITEBYTECODE: "1"}}
    healthcheck: {{start_period: 5s, interval: 5s}}
  replica1: *more
"""
TAG = "v4forge-test-serve:cpu"
STREAM = json.dumps(
    {
        "model": "deepseek-v4-w4a16",
        "prompt": "once",
        "max_tokens": 600,
        "ignore_eos": True,
        "stream": True,
    }
)


@dataclass
class Host:
    """A network of its own with a docker daemon whose NVIDIA hook is a stub; programs run in that network."""

    folder: Path
    daemon: subprocess.Popen[bytes]
    said: str = ""
    words: list[str] = field(default_factory=list)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", f"--net=/proc/{self.daemon.pid}/ns/net", *command]
        variables = os.environ | {"DOCKER_HOST": f"unix://{self.folder}/docker.sock"} | environment
        return subprocess.run(inside, cwd=ROOT, env=variables, capture_output=True, text=True)

    def output(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def serve(self, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "scripts.serve", command, "--folder", str(self.folder / "serve"), *arguments]
        return self.run(*words, **environment)

    def container(self, service: str) -> str:
        label = f"label=com.docker.compose.service={service}"
        return self.output("docker", "ps", "--quiet", "--filter", label)

    def inspect(self, service: str) -> dict[str, object]:
        return json.loads(self.output("docker", "inspect", self.container(service)))[0]

    def inside(self, service: str, *command: str) -> str:
        return self.output("docker", "exec", self.container(service), *command)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, dense_model: Path) -> Iterator[Host]:
    """A deployment of two replicas behind the router, in containers."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a docker daemon")
    folder = tmp_path_factory.mktemp("compose")
    hook = folder / "bin/nvidia-container-runtime-hook"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\ncat >/dev/null\n")
    hook.chmod(0o755)
    program = shutil.which("dockerd")
    assert program, "apt-get install docker.io"
    command = ["unshare", "--net", program, f"--host=unix://{folder}/docker.sock", f"--data-root={folder}/data"]
    command += [f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
    with open(folder / "log", "wb") as log:
        environment = os.environ | {"PATH": f"{hook.parent}:{os.environ['PATH']}"}
        daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    host = Host(folder, daemon)
    try:
        wait_until(lambda: host.run("docker", "info").returncode == 0, 60)
        host.output("ip", "link", "set", "lo", "up")
        load_image(host)
        python = Path(SERVE_ENVIRONMENT, "bin/python").resolve().parents[1]
        more = MOUNTS.format(environment=SERVE_ENVIRONMENT, python=python, patches=ROOT / "patches")
        (folder / "more.yaml").write_text(more)
        host.words = ["--artifact", str(dense_model), "--backend", "cpu", "--runtime", "docker", *dense_settings()]
        # What a deployment on GPUs writes for itself, for one that runs on the CPU.
        gpus = Deployment(folder=str(folder), artifact="", runtime="docker", gpus=[["0", "1"], ["6", "3"]])
        services = json.loads(Compose(gpus).replicas())["services"]
        places = {name: {"deploy": service["deploy"]} for name, service in services.items()}
        (folder / "gpus.yaml").write_text(json.dumps({"services": places}))
        host.words += ["--compose-file", str(folder / "more.yaml"), str(folder / "gpus.yaml"), "--drain", "60"]
        done = host.serve("up", *host.words, API_KEY="sesame", V4FORGE_IMAGE_SERVE=TAG)
        assert done.returncode == 0, done.stdout + done.stderr
        host.said = done.stdout
        yield host
    finally:
        host.serve("stop")
        daemon.terminate()
        daemon.wait(60)


def load_image(host: Host) -> None:
    """Builds the image on the usual daemon, which has a network, and takes it over."""
    context = host.folder / "context"
    context.mkdir()
    for name in ("health", "replica", "watchdog.py"):
        shutil.copy(ROOT / "docker/serve" / name, context / name)
    usual = containers.connect().client
    (context / "Dockerfile").write_text(IMAGE.format(base=base.debian(usual)))
    usual.images.build(path=str(context), tag=TAG, rm=True, labels=definitions.expected_labels("serve"))
    archive = host.folder / "image.tar"
    with open(archive, "wb") as file:
        file.writelines(usual.images.get(TAG).save(named=True))
    usual.images.remove(TAG)
    host.output("docker", "load", "--input", str(archive))
    archive.unlink()


def ask(host: Host, tokens: int = 8, key: str = "sesame") -> subprocess.CompletedProcess[str]:
    body = {"model": "deepseek-v4-w4a16", "prompt": "x", "max_tokens": tokens, "ignore_eos": True}
    words = ["curl", "--silent", "--fail-with-body", "http://127.0.0.1:8000/v1/completions"]
    words += ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {key}", "-d", json.dumps(body)]
    return host.run(*words)


def test_the_start_probes_every_replica_and_ends_with_the_address(host: Host) -> None:
    lines = host.said.splitlines()
    assert lines[-1].startswith("ready: http://127.0.0.1:8000, deepseek-v4-w4a16, context 2,048, k=0, ")
    assert any(line.startswith("replica 1: prompts") and " ok " in line for line in lines)
    assert ask(host).returncode == 0
    assert ask(host, key="open").returncode == 22


def test_each_replica_gets_the_pair_of_gpus_that_is_its_own(host: Host) -> None:
    assert visible(host, "replica0") == ["0,1"]
    assert visible(host, "replica1") == ["6,3"]
    assert visible(host, "router") == []


def visible(host: Host, service: str) -> list[str]:
    """The GPUs that the daemon has the NVIDIA hook give to the service's first process."""
    pid = host.inspect(service)["State"]["Pid"]  # type: ignore[index]
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return [line.split("=")[1] for line in variables if line.startswith("NVIDIA_VISIBLE_DEVICES=")]


def test_no_container_runs_as_root_or_writes_to_the_artifact(host: Host, dense_model: Path) -> None:
    for service in ("replica0", "replica1", "router"):
        assert host.inside(service, "id", "-u") == "10000"
        assert host.inside(service, "grep", "CapEff", "/proc/self/status").split()[1] == "0" * 16
    refused = host.run("docker", "exec", host.container("replica0"), "touch", str(dense_model / "x"))
    assert "Read-only file system" in refused.stderr


def test_nothing_listens_beyond_the_loopback(host: Host) -> None:
    ports = host.output("docker", "port", host.container("router")).splitlines()
    assert sorted(ports) == ["8000/tcp -> 127.0.0.1:8000", "8001/tcp -> 127.0.0.1:8001"]
    for service in ("replica0", "replica1"):
        assert host.output("docker", "port", host.container(service)) == ""


def test_a_replica_reaches_nothing_outside(host: Host) -> None:
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 3)"
    tried = host.run("docker", "exec", host.container("replica0"), "python3", "-c", code)
    assert "Network is unreachable" in tried.stderr or "timed out" in tried.stderr


def test_the_key_is_in_no_configuration_and_no_log_of_a_container(host: Host) -> None:
    for service in ("replica0", "replica1", "router"):
        assert "sesame" not in json.dumps(host.inspect(service))
        assert "sesame" not in host.output("docker", "logs", host.container(service))


def test_the_status_and_docker_say_that_all_is_well(host: Host) -> None:
    rows = json.loads(host.serve("status", "--json").stdout)
    assert [row["state"] for row in rows] == ["ready", "ready"]
    wait_until(lambda: all(health(host, service) == "healthy" for service in ("replica0", "replica1", "router")), 60)


def health(host: Host, service: str) -> str:
    return str(host.inspect(service)["State"]["Health"]["Status"])  # type: ignore[index]


def test_a_killed_replica_comes_back_by_itself_with_what_it_had_compiled(host: Host) -> None:
    before = host.inspect("replica1")
    host.inside("replica1", "touch", "/cache/compiled")
    os.kill(before["State"]["Pid"], 9)  # type: ignore[index]
    for _ in range(4):  # the other one answers
        assert ask(host).returncode == 0
    wait_until(lambda: host.serve("status", "--json").returncode == 0, 240)
    after = host.inspect("replica1")
    assert after["Id"] == before["Id"] and after["RestartCount"] == 1
    assert host.inside("replica1", "ls", "/cache/compiled") == "/cache/compiled"


def test_a_stop_drains_and_keeps_the_caches(host: Host) -> None:
    words = ["nsenter", f"--net=/proc/{host.daemon.pid}/ns/net", "curl", "--silent", "--fail", "--no-buffer"]
    words += ["http://127.0.0.1:8000/v1/completions", "-H", "Content-Type: application/json"]
    words += ["-H", "Authorization: Bearer sesame", "-d", STREAM]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        text=True,
    ) as stream:
        assert stream.stdout is not None
        assert stream.stdout.readline().startswith("data: ")
        done = host.serve("stop")
        assert done.stdout.splitlines()[-1] == "serve: stopped", done.stderr
        assert stream.stdout.read().rstrip().endswith("data: [DONE]")
    assert host.output("docker", "ps", "--all", "--quiet") == ""
    assert "v4forge-8000_cache1" in host.output("docker", "volume", "ls", "--quiet").splitlines()
