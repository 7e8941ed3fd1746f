"""A deployment without containers: the same processes under supervisord, which starts again what ends."""

from __future__ import annotations

import hashlib
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from supervisor.xmlrpc import Faults, SupervisorTransport

from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.files import write_text
from v4forge.serving import router_control, settings
from v4forge.serving.deployment import CONFIGURATION, ROUTER, SUPERVISED, Deployment, Process

REPLICA = ROOT / "docker" / "serve" / "replica"
# supervisord's words -> ours; the others are told as they are.
STATES = {"RUNNING": "running", "STARTING": "starting", "BACKOFF": "exited", "EXITED": "exited", "FATAL": "exited"}
ANSWERS_S = 20.0
OPEN_FILES = 65536  # what vLLM asks for
LOG_BYTES, LOG_FILES = "50MB", 3


class Supervised:
    """supervisord keeps the processes of a deployment: a Runtime."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        self.folder = Path(deployment.folder)
        self.logs = self.folder / "logs"
        # A socket's path has at most 107 characters, and a folder's may have more.
        name = hashlib.sha256(str(self.folder).encode()).hexdigest()[:16]
        self.socket = Path(f"/tmp/v4forge-{os.getuid()}-{name}.sock")

    def check(self) -> None:
        """Raises UserError where a program is missing."""
        if not (Path(self.deployment.program) / "vllm").exists():
            build = "make env-serve-cpu" if self.deployment.backend == "cpu" else "make env-serve"
            raise UserError(f"there is no vllm in {self.deployment.program}", build)
        if " " in self.deployment.program:
            fact = f"the compilers that vLLM runs do not take the blank in {self.deployment.program}"
            raise UserError(fact, "make serve RUNTIME=docker, or move this checkout to a folder without blanks")
        if not settings.PATH.fullmatch(str(self.folder)):
            fact = f"the path {str(self.folder)!r} has a quote or another special character"
            raise UserError(fact, "make serve SCRATCH=<another folder>")
        self.configuration()

    def write(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / SUPERVISED, self.configuration())

    def configuration(self) -> str:
        parts: list[tuple[str, Mapping[str, Any]]] = [
            (
                "supervisord",
                {
                    "logfile": self.logs / "supervisord.log",
                    "pidfile": self.folder / "supervisord.pid",
                    "childlogdir": self.logs,
                    "minfds": min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
                },
            ),
            ("unix_http_server", {"file": self.socket, "chmod": "0700"}),
            (
                "rpcinterface:supervisor",
                {"supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"},
            ),
            *(self._program(name, *self.process(name)) for name in (*self.deployment.names, ROUTER)),
        ]
        sections = ("\n".join([f"[{name}]", *(f"{k}={v}" for k, v in rows.items())]) for name, rows in parts)
        return "\n\n".join(sections) + "\n"

    def process(self, name: str) -> tuple[list[str], dict[str, str]]:
        """A process's command, and its variables besides this environment's."""
        if name == ROUTER:
            haproxy = shutil.which("haproxy", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
            if haproxy is None:
                raise UserError("haproxy, the router, is not installed", "apt-get install haproxy")
            return [haproxy, "-W", "-db", "-f", str(self.folder / CONFIGURATION)], {}
        number = self.deployment.names.index(name)
        variables = self.deployment.variables(number)
        path = [self.deployment.program, os.environ.get("PATH", os.defpath)]
        if (cuda := Path(self.deployment.program).parent / "cuda").exists():  # kernels are compiled when they first run
            variables["CUDA_HOME"] = str(cuda)
            path.append(f"{cuda}/bin")
        variables["PATH"] = ":".join(path)
        variables["STARTS"] = str(self._starts(number))
        if self.deployment.gpus[number]:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.deployment.gpus[number])
        return [str(REPLICA), *self.deployment.arguments(number)], variables

    def _starts(self, number: int) -> Path:
        """Where a replica keeps when it was started."""
        return self.folder / f"starts-{number}"

    def _program(self, name: str, command: Sequence[str], variables: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        rows = {
            "command": shlex.join(command),
            "environment": ",".join(f'{key}="{value}"' for key, value in variables.items()),
            "directory": self.folder,
            "autorestart": "true",
            # A start that ends within this time has failed; it is tried again, without an end, as docker does.
            "startsecs": 1 if name == ROUTER else 10,
            "startretries": 1000000,
            "stopsignal": "USR1" if name == ROUTER else "TERM",
            "stopwaitsecs": self.deployment.drain_s + 5 if name == ROUTER else 60,
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": self.logs / f"{name}.log",
            "stdout_logfile_maxbytes": LOG_BYTES,
            "stdout_logfile_backups": LOG_FILES,
        }
        return f"program:{name}", {key: str(value).replace("%", "%%") for key, value in rows.items()}

    def start(self) -> None:
        if self._answers():
            return
        for name in (*self.deployment.names, ROUTER):
            self._begin(name)
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.folder / SUPERVISED)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"supervisord did not start: {done.stderr.strip()}", f"see {self.logs}/supervisord.log")
        end = time.monotonic() + ANSWERS_S
        while not self._answers():
            if time.monotonic() > end:
                raise UserError("supervisord does not answer", f"see {self.logs}/supervisord.log")
            time.sleep(0.1)

    def _begin(self, name: str) -> None:
        """What an earlier start said is another story, and how often there was one does not count."""
        with suppress(FileNotFoundError):
            (self.logs / f"{name}.log").replace(self.logs / f"{name}.log.before")
        if name != ROUTER:
            self._starts(self.deployment.names.index(name)).unlink(missing_ok=True)

    def replace(self, name: str) -> None:
        self.write()
        try:
            server = self._server()
            server.reloadConfig()  # reads; what runs goes on
            for end in (server.stopProcess, server.removeProcessGroup):
                with suppress(xmlrpc.client.Fault):  # it does not run, or is not known
                    end(name)
            self._begin(name)
            server.addProcessGroup(name)
        except (OSError, xmlrpc.client.Error) as error:
            fact = f"supervisord does not start {name} anew: {error}"
            raise UserError(fact, f"see {self.logs}/supervisord.log") from None

    def processes(self) -> Mapping[str, Process]:
        found = dict.fromkeys((*self.deployment.names, ROUTER), Process())
        with suppress(OSError, xmlrpc.client.Error):
            for each in self._server().getAllProcessInfo():
                state = STATES.get(each["statename"], each["statename"].lower())
                found[each["name"]] = Process(state, str(each["start"] or ""))
        return found

    def log(self, name: str) -> str:
        path = self.logs / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def follow(self, names: Sequence[str], lines: int) -> NoReturn:
        files = [str(self.logs / f"{name}.log") for name in names or (*self.deployment.names, ROUTER)]
        os.execvp("tail", ["tail", f"--lines={lines}", "-F", *files])

    def reload(self) -> None:
        if self.processes()[ROUTER].state != "running":
            raise UserError("the router does not run", "make serve-status")
        with router_control.reloading(self.deployment):
            self._server().signalProcess(ROUTER, "USR2")

    def stop(self, say: Callable[[str], None], silent: Sequence[str] = ()) -> None:
        try:
            self._server().stopProcess(ROUTER)  # SIGUSR1; it ends when its last answer has
        except xmlrpc.client.Fault:
            pass  # it does not run
        except OSError:
            return
        say("serve: no request is left, stopping the replicas")
        with suppress(xmlrpc.client.Fault, OSError):  # of a stop that was cut off, it is shutting down already
            listed = self._server().getAllProcessInfo()
            self._server().shutdown()
            for each in listed:
                if each["name"] in silent and each["pid"]:  # the leader of a group of its own
                    os.killpg(each["pid"], signal.SIGKILL)
        while self._answers(Faults.SHUTDOWN_STATE):  # what it says while it ends its processes
            time.sleep(0.2)

    def _answers(self, *faults: int) -> bool:
        """Whether supervisord answers; with one of these faults, too."""
        try:
            return bool(self._server().getPID())
        except xmlrpc.client.Fault as fault:
            return fault.faultCode in faults
        except (OSError, xmlrpc.client.Error):
            return False

    def _server(self) -> Any:
        transport = SupervisorTransport(serverurl=f"unix://{self.socket}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor
