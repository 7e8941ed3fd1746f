"""What `make serve` starts, as data: replicas, router, where they listen; and how it is kept between commands."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from v4forge.errors import UserError
from v4forge.files import make_folder, read_json, write_json, write_text
from v4forge.serving import client, haproxy, keys, settings
from v4forge.serving.client import Endpoint
from v4forge.serving.haproxy import Addresses, Limits
from v4forge.serving.settings import Serving

STATE, SUPERVISED = "serving.json", "supervisord.conf"
ROLLING = "rolling.json"  # how far the way to another deployment is
# The router's, each in a folder that its container sees: of a file that is replaced it would see the one before.
CONFIGURATION, PAGE, CONTROL = "router/haproxy.cfg", "router/chat.html", "control/haproxy.sock"
KEYS, CERTIFICATE = "keys/api_key", "tls/endpoint.pem"  # a folder each: what containers see of them
REPLICA_PORT = 8000  # in a container; on the host replica N listens on the port N + 2 above the router's
LEAST_WAITING = 128  # requests at a replica, where few run
USER = 10000  # whom a caller who is root runs containers as: the image's own user
ROUTER, METRICS = "router", ("prometheus", "grafana")


@dataclass(frozen=True)
class Deployment:
    """What `make serve` starts. `folder` holds its files; `gpus` the devices of each replica, none on a CPU;
    `overrides` are the operator's settings of vLLM; `key_file` holds the API keys, "" for none; `cert` and `cert_key`
    are the operator's files of a certificate, "" for no TLS; `program` is the folder of a host's vllm; `compose` are
    files on top of compose.yaml; `model` is the name that it is served under, "" for the settings' own; `waiting` is
    how many requests may wait at a replica, None for as many as run, LEAST_WAITING at least; `per_source` how many
    connections an address may have; `watchdog_s` how long a replica may hang until it is ended, 0 for ever; `context`
    is the longest that fits where the profile's does not, 0 where it does; `image_id` is what `image` was at the
    start."""

    folder: str
    artifact: str
    runtime: str
    backend: str = "cuda"
    profile: str = "published"
    overrides: dict[str, str] = field(default_factory=dict)
    gpus: Sequence[Sequence[str]] = ((),)
    bind: str = "127.0.0.1"
    port: int = 8000
    key_file: str = ""
    cert: str = ""
    cert_key: str = ""
    drain_s: int = 600
    waiting: int | None = None
    per_source: int = Limits.per_source
    watchdog_s: int = 180
    metrics: bool = False
    image: str = ""
    program: str = ""
    compose: Sequence[str] = ()
    model: str = ""
    context: int = 0
    image_id: str = ""

    @property
    def serving(self) -> Serving:
        found: dict[str, str | int] = {settings.NAME_SERVED: self.model, settings.CONTEXT: self.context}
        known = {name: value for name, value in found.items() if value}
        return settings.serving(self.profile, self.backend, self.overrides, known)

    @property
    def replicas(self) -> int:
        return len(self.gpus)

    @property
    def names(self) -> list[str]:
        """The replicas' names, first to last."""
        return [f"replica{number}" for number in range(self.replicas)]

    @property
    def url(self) -> str:
        """Where clients ask."""
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.bind, self.listens)
        return f"http{'s' * bool(self.cert)}://{shown}:{self.port}"

    @property
    def listens(self) -> str:
        """The address of the endpoint, as it stands before a colon and a port."""
        return f"[{self.bind}]" if ":" in self.bind else self.bind

    @property
    def admin_url(self) -> str:
        """Where this machine asks one replica, and the router about itself."""
        return f"http://127.0.0.1:{self.port + 1}"

    @property
    def keys(self) -> str:
        """The file of API keys; "" where there is none."""
        try:
            return Path(self.key_file).read_text(encoding="utf-8").strip() if self.key_file else ""
        except FileNotFoundError:
            return ""

    @property
    def key(self) -> str:
        """The one that we ask with."""
        return keys.own(self.keys)

    @property
    def owner(self) -> int | None:
        """Whom files belong to that only the processes may read, None for who starts them."""
        return USER if self.runtime == "docker" and not os.getuid() else None

    @property
    def endpoints(self) -> list[Endpoint]:
        """The replicas, each asked for itself."""
        return client.endpoints(self.admin_url, self.replicas, self.key)

    def arguments(self, number: int) -> list[str]:
        """What follows `vllm serve` for a replica."""
        if self.runtime == "docker":
            return self.serving.arguments(self.artifact, REPLICA_PORT)
        return self.serving.arguments(self.artifact, self.replica_port(number), "127.0.0.1")

    def variables(self, number: int) -> dict[str, str]:
        """The environment that the settings give a replica, with the folder of its caches, and what it has to know of
        who gets in: where the keys are, and how many replicas share what a key is good for; and its
        watchdog."""
        keys_at = f"/{KEYS}" if self.key_file and self.runtime == "docker" else self.key_file
        access = {"API_KEY_FILE": keys_at, "REPLICAS": str(self.replicas)}
        return self.serving.variables(self.cache(number)) | access | {"WATCHDOG": str(self.watchdog_s)}

    @property
    def content(self) -> list[object]:
        """What its replicas are made of, however that was asked for."""
        words = [(self.arguments(number), self.variables(number)) for number in range(self.replicas)]
        return [self.artifact, self.image_id, self.program, words]

    def cache(self, number: int) -> str:
        """Where a replica keeps what it compiles: in its volume, of which each user has a folder, as nobody may write
        to what another has compiled; or in the deployment's folder, below home where that has a blank in its path,
        which inductor's calls of g++ take apart."""
        if self.runtime == "docker":
            return f"/cache/{os.getuid() or USER}"
        if " " not in self.folder:
            return f"{self.folder}/cache/{number}"
        name = hashlib.sha256(self.folder.encode()).hexdigest()[:16]
        return f"{Path.home()}/.cache/v4forge/serve-{name}/{number}"

    def replica_port(self, number: int) -> int:
        return self.port + 2 + number

    def ports(self) -> Iterator[tuple[str, int]]:
        """(address, port) of everything that listens on this machine."""
        yield self.bind, self.port
        yield "127.0.0.1", self.port + 1
        if self.runtime == "host":
            yield from (("127.0.0.1", self.replica_port(number)) for number in range(self.replicas))

    def router_configuration(self, out: Collection[int] = ()) -> str:
        """haproxy's, by which the replicas `out` get nothing but what asks for them."""
        if self.runtime == "docker":
            names = [f"{name}:{REPLICA_PORT}" for name in self.names]
            pem = f"/{CERTIFICATE}" if self.cert else ""
            addresses = Addresses("*:8000", "*:8001", names, haproxy.DOCKER_RESOLVER, pem, f"/{CONTROL}", f"/{PAGE}")
        else:
            names = [f"127.0.0.1:{self.replica_port(number)}" for number in range(self.replicas)]
            pem = f"{self.folder}/{CERTIFICATE}" if self.cert else ""
            public, admin = f"{self.listens}:{self.port}", f"127.0.0.1:{self.port + 1}"
            # Relative to the deployment's folder, where it runs: a socket's path has at most 107 characters.
            page = f"{self.folder}/{PAGE}"
            addresses = Addresses(public, admin, names, certificate=pem, socket=f"unix@{CONTROL}", page=page)
        return haproxy.configuration(addresses, self.drain_s, self.limits, self.serving.prefix_caching, out=out)

    @property
    def limits(self) -> Limits:
        """What the router lets in."""
        running = self.serving.max_num_seqs
        waiting = max(running, LEAST_WAITING) if self.waiting is None else self.waiting
        return Limits(running, waiting, self.per_source)

    def save(self) -> None:
        """Keeps it in its folder, with the router's configuration."""
        folder = Path(self.folder)
        for place in (KEYS, CERTIFICATE, CONFIGURATION, CONTROL):
            make_folder((folder / place).parent)
        control = (folder / CONTROL).parent
        control.chmod(0o700)
        if self.owner is not None:
            os.chown(control, self.owner, self.owner)
        self.write_router()
        write_json(folder / STATE, asdict(self))

    def write_router(self, out: Collection[int] = ()) -> None:
        """Writes the router's configuration and its page, which it reads when it starts and at a reload."""
        write_text(Path(self.folder) / PAGE, haproxy.PAGE.read_text(encoding="utf-8"))
        write_text(Path(self.folder) / CONFIGURATION, self.router_configuration(out))

    @classmethod
    def load(cls, folder: Path) -> Deployment | None:
        """The deployment that was started in this folder and not stopped, None where there is none."""
        if not (folder / STATE).exists():
            return None
        try:
            return cls(**read_json(folder / STATE))
        except TypeError:
            raise UserError(f"{folder / STATE} was written by another version", "make serve-stop") from None

    @classmethod
    def left(cls, folder: Path) -> Deployment | None:
        """As much of a deployment as a stop needs, of what is kept in this folder by whatever version, whole or not;
        None where nothing is kept. A port of 0 is one that is not known."""
        if not (folder / STATE).exists():
            return None
        kept = read_json(folder / STATE)
        docker = kept.get("runtime", "") == "docker" or not (folder / SUPERVISED).exists()
        key_file, replicas = Path(os.path.abspath(folder)) / KEYS, kept.get("gpus")
        return cls(
            folder=os.path.abspath(folder),
            artifact="",
            runtime="docker" if docker else "host",
            gpus=((),) * (len(replicas) if isinstance(replicas, list) else 1),
            port=kept["port"] if isinstance(kept.get("port"), int) else 0,
            key_file=str(key_file) if key_file.is_file() else "",
            drain_s=kept["drain_s"] if isinstance(kept.get("drain_s"), int) else cls.drain_s,
        )

    def forget(self) -> None:
        """Takes away what save() kept: it runs no more."""
        for kept in (STATE, ROLLING):
            (Path(self.folder) / kept).unlink(missing_ok=True)

    def differing(self, other: Deployment) -> list[str]:
        """The names of what another deployment was asked to have different."""
        a, b = (json.loads(json.dumps(asdict(each))) for each in (self, other))  # tuples as lists, as they are kept
        return [name for name in a if a[name] != b[name] and name != "context"]


@dataclass(frozen=True)
class Process:
    """What its keeper says of a process: running, starting, exited, missing or another word of the keeper's. `run` is
    another one when it has been started again, "" before its first start."""

    state: str = "missing"
    run: str = ""


class Runtime(Protocol):
    """What keeps a deployment's processes: docker compose, or supervisord. `names` are replicas, or the router's."""

    deployment: Deployment

    def check(self) -> None:
        """Raises UserError for a deployment that it cannot keep. Nothing is written."""

    def write(self) -> None:
        """Writes the files that start() reads. Raises UserError for what cannot be read so."""

    def start(self) -> None:
        """Starts everything that does not run yet."""

    def processes(self) -> Mapping[str, Process]:
        """What runs, by name; those that should and do not are missing."""

    def replace(self, name: str) -> None:
        """Stops a replica, whatever it is made of, and starts it as this deployment has it; nothing else is touched.
        Raises UserError where that cannot be."""

    def log(self, name: str) -> str:
        """What it has said since its start."""

    def follow(self, names: Sequence[str], lines: int) -> None:
        """Becomes a program that shows the last lines and goes on."""

    def reload(self) -> None:
        """Has the router read its configuration and certificate anew, and returns when it has; what runs goes on.
        Raises UserError where it cannot."""

    def stop(self, say: Callable[[str], None], silent: Sequence[str] = ()) -> None:
        """Drains the router, then stops all; `silent` replicas, which have answered nothing, at once."""
