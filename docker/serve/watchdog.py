#!/usr/bin/env python3
"""watchdog.py COMMAND…: runs a replica's server, and ends it when it hangs. What keeps replicas then starts it again.

vLLM's /health is answered by a process that stays well while its engine waits for a GPU that never returns. So /metrics
is read: an engine that has requests and makes no step for WATCHDOG seconds hangs, and so does a server that has once
answered and then is silent for as long. 180 s are an estimate of what no step takes: its tokens are bounded, and take
seconds, and a kernel that it compiles takes tens of seconds. With several GPUs vLLM gives up by itself, after 300 s.
What is counted are looks, not time: none is made while the machine is suspended or the container paused. WATCHDOG=0
looks at nothing.
"""

from __future__ import annotations

import ctypes
import http.client
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

WATCHDOG_S = 180.0
LOOK_S, FEWEST_LOOKS = 10.0, 6
GRACE_S = 10.0  # from SIGTERM to SIGKILL; WATCHDOG_GRACE is another
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAMPLE = re.compile(r"^([\w:]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
ENGINE = re.compile(r'engine="(\w+)"')
# Above 0: an engine has requests. As the engine tells these with its steps, one that hangs in its first is told by the
# server's own count, of requests that have come whole and have no byte of an answer (patches/vllm/plugin).
BUSY = frozenset({"vllm:num_requests_running", "vllm:num_requests_waiting", "v4forge_requests_unanswered"})
# Whatever changes with a step; of a long prompt's, only the share of the cache in use.
STEPS = frozenset(
    {
        "vllm:generation_tokens_total",
        "vllm:iteration_tokens_total_count",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prompt_tokens_total",
        "vllm:request_success_total",
    }
)
ANY = ""  # in the place of an engine: all of them together

Samples = dict[str, list[str]]


def read(text: str) -> tuple[Samples, set[str]]:
    """What changes with steps, by engine and of ANY; and who of these has requests."""
    steps: Samples = {}
    busy: set[str] = set()
    for sample in SAMPLE.finditer(text):
        name, labels, value = sample.groups()
        engine = found[1] if (found := ENGINE.search(labels or "")) else ANY
        if name in BUSY and float(value) > 0:
            busy.add(engine)
        if name in STEPS:
            for each in {engine, ANY}:
                steps.setdefault(each, []).append(sample[0])
    return steps, busy


@dataclass
class Watch:
    """What was seen of a server, look by look. `still` counts, by engine, looks in a row that found requests and no
    step since the one before; it hangs after `looks` of these."""

    looks: int
    ready: bool = False
    blind: bool = False
    silent: int = 0
    still: dict[str, int] = field(default_factory=dict)
    steps: Samples = field(default_factory=dict)

    def see(self, text: str | None) -> str:
        """How it hangs, "" where it does not; `text` is an answer of /metrics, None where there was none."""
        if text is None:
            self.silent += self.ready
            self.still = {}
            return "does not answer" if self.silent >= self.looks else ""
        self.ready, self.silent = True, 0
        steps, busy = read(text)
        self.blind = not steps
        same = [engine for engine in busy if engine in steps and steps[engine] == self.steps.get(engine)]
        self.still = {engine: self.still.get(engine, 0) + 1 for engine in same}
        self.steps = steps
        return "has requests and makes no step" if max(self.still.values(), default=0) >= self.looks else ""


def metrics(port: int, limit_s: float) -> str | None:
    """The answer of /metrics, whatever its status; None where there is none in time."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit_s)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


class Server:
    """The command as a process of this one's group, which ends with it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.stopping = False
        self.ended = threading.Event()
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)
        for number in STOPS:
            signal.signal(number, self._stop)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until there is a process to hand them on to
        prctl = ctypes.CDLL(None).prctl

        def begin() -> None:
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

        self.process = subprocess.Popen(command, preexec_fn=begin)
        threading.Thread(target=self._wait, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def _stop(self, number: int, _: object) -> None:
        self.stopping = True
        self.process.send_signal(number)

    def _wait(self) -> None:
        self.process.wait()
        self.ended.set()

    def status(self) -> int:
        """What a shell says of its end."""
        code = self.process.wait()
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        """Ends it and all that it has started, and this process, unless that is a container's first."""
        self.process.terminate()
        self.ended.wait(float(os.environ.get("WATCHDOG_GRACE") or GRACE_S))
        os.killpg(0, signal.SIGKILL)


def port_of(command: Sequence[str]) -> int:
    """Where the command's server listens: vLLM's own port where it says none."""
    return int(command[command.index("--port") + 1]) if "--port" in command else 8000


def say(words: str) -> None:
    print(f"watchdog: {words}", file=sys.stderr, flush=True)


def main(command: Sequence[str]) -> int:
    watchdog_s = float(os.environ.get("WATCHDOG") or WATCHDOG_S)
    if not watchdog_s:
        os.execvp(command[0], [*command])
    look_s = min(LOOK_S, watchdog_s / FEWEST_LOOKS)
    watch, port, told = Watch(math.ceil(watchdog_s / look_s)), port_of(command), False
    server = Server(command)
    pause_s = look_s
    while not server.ended.wait(pause_s) and not server.stopping:
        begun = time.monotonic()
        hang = watch.see(metrics(port, look_s))
        if hang and not server.stopping:
            say(f"the server {hang} for {watchdog_s:g} s; it is ended, to be started again")
            server.kill()
            break
        if watch.blind and not told:
            say("/metrics says nothing of an engine; only a server that does not answer is ended")
            told = True
        pause_s = max(look_s - (time.monotonic() - begun), 0)
    return server.status()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
