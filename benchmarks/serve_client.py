"""One `vllm serve`, started and asked over HTTP: tokens, their log-probabilities, the times of a stream, counters."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4forge import gpus
from v4forge.errors import UserError
from v4forge.serving import metrics
from v4forge.serving.settings import Serving

TOP = 5  # alternatives that the server names beside each token
FIRST_S = 300.0  # for a server's first answers, which compile kernels
LOG_TAIL = 12

# What vLLM's log says of its start, by the name that it gets here; the last line that matches counts.
LOGGED = {
    "weights_read_s": r"Loading weights took ([\d.]+) seconds",
    "model_gib": r"Model loading took ([\d.]+) GiB memory",
    "model_loaded_s": r"Model loading took [\d.]+ GiB memory and ([\d.]+) seconds",
    "graphs_s": r"Graph capturing finished in ([\d.]+) secs",
    "graphs_gib": r"Graph capturing finished in [\d.]+ secs, took ([-\d.]+) GiB",
    "engine_s": r"init engine \(profile, create kv cache, warmup model\) took ([\d.]+) s",
}


@dataclass(frozen=True)
class Answer:
    """What a server wrote behind a prompt."""

    tokens: list[int]
    logprobs: list[float]  # of each token, nats
    top: list[dict[int, float]]  # the most likely tokens at each place, the written one among them


@dataclass(frozen=True)
class Drafts:
    """Draft counters: steps that drafts were made for, and how many were accepted at each of the k places."""

    steps: int
    accepted: tuple[int, ...]

    def since(self, before: Drafts) -> Drafts:
        places = zip(self.accepted, before.accepted or (0,) * len(self.accepted), strict=True)
        return Drafts(self.steps - before.steps, tuple(a - b for a, b in places))


@dataclass
class Server:
    """A server of `artifact` on some GPUs; `start` returns at once, `wait` when it is ready."""

    command: Sequence[str]
    artifact: Path
    settings: Serving
    gpus: Sequence[int]
    log: Path
    cache: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    failure: str = ""
    answers: list[Answer] = field(default_factory=list)
    counted: list[Drafts] = field(default_factory=list)  # drafts of each answer
    found: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        self.port = free_port()
        arguments = self.settings.arguments(str(self.artifact), self.port, "127.0.0.1")
        self.found |= {"arguments": arguments[1:], "gpus": list(self.gpus), "drafts": self.settings.drafts}
        environment = os.environ | self.settings.variables(str(self.cache))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpus))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        with open(self.log, "wb") as log:
            try:
                self.process = subprocess.Popen(
                    [*self.command, "serve", *arguments],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise UserError(f"cannot run {self.command[0]}: {error.strerror}", "--vllm names the command") from None

    def wait(self, limit_s: float) -> bool:
        """Whether the server became ready within `limit_s` of its start; if not, `failure` says how it ended."""
        assert self.process
        while time.monotonic() - self.started < limit_s:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                self.found["ready_s"] = time.monotonic() - self.started
                text = self.log.read_text(errors="replace")
                self.found |= logged(text) | {"guard": re.findall(r"v4forge: (.+)", text)}
                return True
            if self.process.poll() is not None:
                return self.failed(f"ended with code {self.process.returncode}")
            time.sleep(0.5)
        return self.failed(f"not ready after {limit_s:.0f} s")

    def failed(self, why: str) -> bool:
        tail = self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
        self.failure = why
        self.found |= {"failure": why, "log": tail}
        return False

    def stop(self) -> None:
        """Ends the server and all processes of its own."""
        if not self.process:
            return
        for number, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):  # its children may outlive it
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience_s)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _open(self, path: str, body: dict[str, Any] | None = None, limit_s: float = FIRST_S) -> Any:
        data = None if body is None else json.dumps({"model": self.settings.model, **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=limit_s)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:300]
            raise UserError(f"{path}: {error.code} {said}", f"see {self.log}") from None
        except OSError as error:
            raise UserError(f"{path}: {error}", f"see {self.log}") from None

    def get(self, path: str) -> str:
        with self._open(path) as answer:
            return answer.read().decode()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._open(path, body) as answer:
            return json.load(answer)

    def complete(self, prompt: Sequence[int], count: int) -> Answer:
        """`count` greedy tokens with the log-probabilities of the most likely ones."""
        asked = {**greedy(prompt, count), "logprobs": TOP, "return_tokens_as_token_ids": True}
        (choice,) = self.post("/v1/completions", asked)["choices"]
        logprobs = choice["logprobs"]
        top = [{token_of(name): value for name, value in place.items()} for place in logprobs["top_logprobs"]]
        return Answer(choice["token_ids"], logprobs["token_logprobs"], top)

    def stream(self, prompt: Sequence[int], count: int) -> list[tuple[float, int]]:
        """When each piece of an answer of `count` tokens came, seconds after the request, and its tokens."""
        begun = time.perf_counter()
        pieces = []
        with self._open("/v1/completions", {**greedy(prompt, count), "stream": True}) as answer:
            for event in events(answer):
                now = time.perf_counter() - begun
                for choice in event["choices"]:
                    pieces.append((now, len(choice.get("token_ids") or ())))
        return [piece for piece in pieces if piece[1]]

    def drafts(self) -> Drafts:
        return counters(self.get("/metrics"))


def greedy(prompt: Sequence[int], count: int) -> dict[str, Any]:
    """A request for exactly `count` tokens, each the most likely one."""
    fixed = {"max_tokens": count, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"prompt": list(prompt), **fixed}


def token_of(name: str) -> int:
    """vLLM's `token_id:17` -> 17."""
    return int(name.removeprefix("token_id:"))


def events(lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events, up to [DONE]."""
    for line in lines:
        data = line.decode().strip().removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if data:
            yield json.loads(data)


def tpot(pieces: Sequence[tuple[float, int]]) -> float:
    """Milliseconds per output token behind the first piece."""
    (first, head), (last, _) = pieces[0], pieces[-1]
    return 1000 * (last - first) / (sum(count for _, count in pieces) - head)


def counters(text: str) -> Drafts:
    """The counters in an answer of /metrics; no steps and no places where the server does not speculate."""
    counts = metrics.read(text, time.time()).counts
    return Drafts(int(counts.drafts or 0), tuple(map(int, counts.accepted_at or ())))


def logged(text: str) -> dict[str, float]:
    """The figures of LOGGED in a server's log; a figure that it does not tell is left out."""
    hits = {name: re.findall(pattern, text) for name, pattern in LOGGED.items()}
    return {name: float(values[-1]) for name, values in hits.items() if values}


def free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def gpu_processes() -> dict[int, float]:
    """GiB of GPU memory by process; {} where the driver does not tell."""
    try:
        programs = gpus.processes()
    except UserError:
        return {}
    found: dict[int, float] = {}
    for program in programs:
        found[program.pid] = found.get(program.pid, 0.0) + (program.used_bytes or 0) / 2**30
    return found


def gpu_memory(server: Server) -> float:
    """GiB of GPU memory that a server's processes hold, on all its GPUs."""
    total = 0.0
    for pid, gib in gpu_processes().items():
        with suppress(ProcessLookupError):
            if server.process and os.getpgid(pid) == server.process.pid:
                total += gib
    return total
