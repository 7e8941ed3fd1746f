"""The stages as programs, for tests: as `python -m`, in the test process, or forked from a warm process to be killed.

`python tests/support/programs.py` is that warm process: it has torch and transformers imported and forks one child a
request, because a start from nothing takes seconds, and what is killed has to be a process.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ports import free_port
from safetensors import safe_open
from synthetic import OTHER, SMALL, write_checkpoint

from v4forge.errors import run_main

ROOT = Path(__file__).resolve().parents[2]
TOKENIZED = 1024  # the vocabulary of models/tiny's tokenizer
FORMS: dict[str, dict[str, Any]] = {
    "small": SMALL | {"vocab_size": TOKENIZED},
    "other": OTHER | {"vocab_size": TOKENIZED},
}


def write_source(directory: Path, form: str = "small", **overrides: Any) -> Path:
    """A synthetic checkpoint with a tokenizer."""
    write_checkpoint(directory, **FORMS[form] | overrides)
    return directory


def write_corpus(path: Path, documents: int = 60) -> Path:
    """Text of some variety, about 110 tokens a document."""
    path.write_text(
        "\f\n".join(
            f"def f_{i}(x):\n    return x * {i * i} + {i}\n\n# {i}: a fox jumps\n" * 4 for i in range(documents)
        )
    )
    return path


def calibrate_arguments(source: Path, work: Path, corpus: Path, samples: int = 12, seq_len: int = 64) -> list[str]:
    named = {"source": source, "work": work, "corpus": corpus, "samples": samples, "seq-len": seq_len}
    named["micro-batch-tokens"] = 4 * seq_len
    return [part for name, value in named.items() for part in (f"--{name}", str(value))]


def run_module(stage: str, *arguments: object) -> str:
    """`python -m scripts.<stage>`, which has to succeed -> its output."""
    command = [sys.executable, "-m", f"scripts.{stage}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_here(stage: str, *arguments: object) -> int:
    """The program in this process -> its exit code. Defects of ours come through."""
    module = importlib.import_module(f"scripts.{stage}")
    threads = torch.get_num_threads()
    try:
        with mock.patch.object(sys, "argv", [stage, *map(str, arguments)]):
            run_main(module.main)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        torch.set_num_threads(threads)
    raise AssertionError("run_main returned")


def contents(folder: Path) -> dict[str, bytes]:
    """name -> bytes of every file below `folder`, hidden ones too; without what a run of calibration took."""
    return {p.relative_to(folder).as_posix(): _comparable(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def _comparable(path: Path) -> bytes:
    content = b"" if path.name == "calibration.html" else path.read_bytes()
    if re.fullmatch(r"layer-\d+\.json", path.name):
        report = json.loads(content)
        del report["run"]
        content = json.dumps(report, sort_keys=True).encode()
    return content


def temporaries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.tmp"))


def assert_shards_are_whole(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        if not path.name.startswith("."):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, not a dict
                    file.get_tensor(name)


@dataclass(frozen=True)
class Death:
    """When a forked program kills itself with SIGKILL: "half", while it writes the `count`-th tensor; "temporary", when
    the file `name` is written but not yet renamed; "renamed", right after that."""

    moment: str
    name: str = ""
    count: int = 1


@dataclass(frozen=True)
class Place:
    """A process's place among those of a run, as torchrun says it."""

    rank: int
    size: int
    port: int
    address: str = "127.0.0.1"

    def environment(self) -> dict[str, str]:
        ranks = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": self.size, "MASTER_PORT": self.port}
        ranks["LOCAL_WORLD_SIZE"] = self.size
        told = {"TORCHELASTIC_RUN_ID": "a test", "MASTER_ADDR": self.address}
        return told | {name: str(value) for name, value in ranks.items()}


def kill_when(until: Callable[[], bool], pids: Sequence[int]) -> None:
    """Sends SIGKILL to children of the fork server when `until` says so, or when one of them has ended.

    A child stays a zombie until it is asked for, so its id is its own.
    """

    def ended(pid: int) -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    while not until() and not any(map(ended, pids)):
        time.sleep(0.001)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


class ForkServer:
    """A process with the stages imported, from which each run is forked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self, stage: str, arguments: list[str], log: Path, death: Death | None = None, place: Place | None = None
    ) -> int:
        """Forks a program, or a `module:function` of the tests, and returns its process id; to be reaped."""
        moment = [death.moment, death.name, death.count] if death else None
        environment = place.environment() if place else {}
        request = {"stage": stage, "arguments": arguments, "log": str(log), "death": moment, "env": environment}
        return int(self._ask(request))

    def reap(self, pid: int) -> int:
        """Waits for its end -> the exit status as in subprocess."""
        return int(self._ask({"reap": pid}))

    def run(
        self,
        stage: str,
        arguments: list[str],
        log: Path,
        death: Death | None = None,
        until: Callable[[], bool] | None = None,
    ) -> int:
        """The exit status as in subprocess. The process is killed when `until` says so, if it still runs then."""
        pid = self.start(stage, arguments, log, death)
        if until is not None:
            kill_when(until, [pid])
        return self.reap(pid)

    def run_ranks(
        self,
        size: int,
        stage: str,
        arguments: list[str],
        log: Path,
        until: Callable[[], bool] | None = None,
        victims: Sequence[int] | None = None,
        address: str = "127.0.0.1",
    ) -> list[int]:
        """The same as `size` ranks of one run, without torchrun -> their exit statuses. Rank r's log is `log`.r; at the
        moment `until`, all ranks or `victims` are killed."""
        port = free_port()
        logs = [log.with_name(f"{log.name}.{rank}") for rank in range(size)]
        pids = [
            self.start(stage, arguments, logs[rank], place=Place(rank, size, port, address)) for rank in range(size)
        ]
        if until is not None:
            kill_when(until, [pids[rank] for rank in (range(size) if victims is None else victims)])
        return [self.reap(pid) for pid in pids]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(30) == 0


@contextmanager
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    try:
        yield server
    finally:
        server.close()


def _die_at(moment: str, name: str, count: int) -> None:
    from v4forge.checkpoint import writer

    kill = signal.SIGKILL
    replace, tensor_bytes, written = os.replace, writer.tensor_bytes, 0

    def dying_replace(temporary: Any, final: Any) -> None:
        if Path(final).name != name:
            return replace(temporary, final)
        if moment == "renamed":
            replace(temporary, final)
        os.kill(os.getpid(), kill)

    def dying_tensor_bytes(tensor: torch.Tensor) -> memoryview:
        nonlocal written
        written += 1
        if written == count:
            os.kill(os.getpid(), kill)
        return tensor_bytes(tensor)

    if moment == "half":
        writer.tensor_bytes = dying_tensor_bytes
    else:
        os.replace = dying_replace


def _serve() -> None:
    from v4forge.verification import certificate  # noqa: F401, what the programs import by and by

    for stage in ("calibrate", "postprocess", "verify", "dequant"):
        importlib.import_module(f"scripts.{stage}")
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        elif (answer := os.fork()) == 0:
            log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if request["death"]:
                _die_at(*request["death"])
            os.environ.update(request["env"])
            module, _, function = request["stage"].partition(":")
            if function:
                code = getattr(importlib.import_module(module), function)(*request["arguments"]) or 0
            else:
                code = run_here(module, *request["arguments"])
            sys.stdout.flush()
            os._exit(code)
        answers.write(f"{answer}\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
