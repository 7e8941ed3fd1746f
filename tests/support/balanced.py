"""A real haproxy with the router's configuration, before stand-ins of replicas that fail in ways that a healthy vLLM
does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from ports import free_ports
from worker_stand_in import Worker

from v4forge.serving import haproxy, router_control
from v4forge.serving.deployment import CONTROL, Deployment
from v4forge.serving.haproxy import Addresses

OPTIONS: dict[str, Any] = {"drain_s": 30, "limits": haproxy.Limits(), "by_prefix": False}


@dataclass
class Answer:
    """What a client got: the status, 0 for none; the lines of the body; whether it came to its end."""

    status: int = 0
    lines: list[str] = field(default_factory=list)
    whole: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    elapsed_s: float = 0.0


@dataclass
class Router:
    """`said` is haproxy's log."""

    public: str
    admin: str
    workers: list[Worker]
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def ask(
        self,
        at: str = "",
        to: str = "/v1/completions",
        limit_s: float = 60,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> Answer:
        """One request, its answer read to the end."""
        begun, got = time.monotonic(), Answer()
        try:
            with httpx.stream(
                "POST", f"{at or self.public}{to}", json=body, timeout=limit_s, headers=headers, verify=False
            ) as answer:
                got.status, got.headers = answer.status_code, dict(answer.headers)
                for line in answer.iter_lines():
                    got.lines.append(line)
                got.whole = True
        except httpx.HTTPError:
            pass
        got.elapsed_s = time.monotonic() - begun
        return got

    def ask_all(self, bodies: Sequence[dict[str, Any]], meanwhile: Callable[[], None] = lambda: None) -> list[Answer]:
        """All of them at once; `meanwhile` runs half a second after their start."""
        answers = [Answer() for _ in bodies]

        def one(place: int) -> None:
            answers[place] = self.ask(**bodies[place])

        threads = [threading.Thread(target=one, args=(place,)) for place in range(len(bodies))]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        meanwhile()
        for thread in threads:
            thread.join()
        return answers

    def weigh(self, number: int, weight: int) -> None:
        """What `make serve` says to take a worker out, 0, and to put it back, 1."""
        folder = Deployment(str(self.log.parent), "", "host")
        assert not router_control.told(folder, f"set weight replicas/replica{number} {weight}").strip()

    def seen(self, **body: Any) -> list[int]:
        """How often each worker has got exactly this request."""
        content = json.dumps(body).encode()
        return [sum(json.loads(each) == json.loads(content) for each in worker.seen) for worker in self.workers]


def program() -> str:
    found = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    assert found, "apt-get install haproxy"
    return found


@contextmanager
def router(folder: Path, count: int, certificate: str = "", **options: Any) -> Iterator[Router]:
    """haproxy before `count` workers, all of which are up. `options` are configuration()'s; with a `certificate`
    it speaks TLS."""
    first = free_ports(2 + count)
    workers = [Worker(first + 2 + place) for place in range(count)]
    public, admin = f"127.0.0.1:{first}", f"127.0.0.1:{first + 1}"
    (folder / CONTROL).parent.mkdir(exist_ok=True)
    at = [f"127.0.0.1:{worker.port}" for worker in workers]
    addresses = Addresses(public, admin, at, certificate=certificate, socket=f"unix@{CONTROL}")
    (folder / "haproxy.cfg").write_text(haproxy.configuration(addresses, **(OPTIONS | options)))
    with ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker.run())
        log = stack.enter_context(open(folder / "log", "wb"))
        command = [program(), "-W", "-db", "-f", str(folder / "haproxy.cfg")]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        made = Router(f"http{'s' * bool(certificate)}://{public}", f"http://{admin}", workers, folder / "log", process)
        wait_for(lambda: up(made) == count, 20)
        yield made


def up(made: Router) -> int:
    """How many replicas the router gives requests to. Asked fifty times a second: httpx takes ten times as long."""
    try:
        with urllib.request.urlopen(f"{made.admin}/router/stats;csv", timeout=5) as answer:
            rows = answer.read().decode().splitlines()
    except OSError:
        return -1
    names = rows[0].lstrip("# ").split(",")
    found = [dict(zip(names, row.split(","), strict=False)) for row in rows[1:]]
    return sum(
        row["pxname"] == "replicas" and row["svname"].startswith("replica") and row["status"].startswith("UP")
        for row in found
    )


def wait_for(condition: Callable[[], bool], limit_s: float) -> float:
    """Seconds until it came to pass."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < limit_s, f"it did not come to pass within {limit_s} s"
        time.sleep(0.02)
    return time.monotonic() - begun
