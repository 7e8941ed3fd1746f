"""Runs lm-eval where it is installed, a folder of programs or the serving image, and watches it: a server that fails or
stalls ends it in time, with what happened as an error that a user can act on."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from docker.errors import APIError, DockerException, ImageNotFound
from docker.models.containers import Container
from requests.exceptions import RequestException

from v4forge import children
from v4forge.bench.quality import Task
from v4forge.errors import UserError
from v4forge.images import jobs, refusals
from v4forge.images.containers import Engine
from v4forge.images.jobs import RUN_LABEL, Job
from v4forge.network import Network
from v4forge.serving.client import LOGS, short

POLL_S = 0.2
# Until lm-eval asks the first question: it downloads data and builds up to 56168 prompts.
PREPARE_LIMIT_S = 3600.0
# Besides the time for one answer, before a run without any is given up.
GRACE_S = 30.0
# From SIGTERM to SIGKILL.
STOP_S = 10.0
TAIL_BYTES = 1 << 16
PROGRESS = re.compile(r"Requesting API:[^\r\n]*?(\d+)/(\d+)")
REFUSED = re.compile(r"Status code: (\d+), Response text: (.*)")
RAISED = re.compile(r"(?:Exception:|^|[\s.])(\w*(?:Error|Timeout|Enabled)\w*)[(:]", re.MULTILINE)
CACHED = re.compile(r"Cached requests: (\d+)")
AGAIN = "then the same again: the answers that came are kept"

REFUSAL = "ClientResponseError"
# Other exceptions of lm-eval's requests -> fact; the hint is to look at the server.
EXCEPTIONS = {
    "ClientConnectorError": "the server refuses connections",
    "ConnectionRefusedError": "the server refuses connections",
    "ServerDisconnectedError": "the server broke a connection off",
    "ClientOSError": "the server broke a connection off",
    "ConnectionResetError": "the server broke a connection off",
    "ClientPayloadError": "the server broke a connection off",
    "TimeoutError": "an answer did not come in time",
    "ContentTypeError": "the server answered something else than JSON",
    "JSONDecodeError": "the server answered something else than JSON",
    "UnicodeDecodeError": "the server answered something else than JSON",
    "KeyError": "the server answered JSON that is no completion",
    "TypeError": "the server answered JSON that is no completion",
    "AttributeError": "the server answered JSON that is no completion",
    "IndexError": "the server answered JSON that is no completion",
    "AssertionError": "the server answered JSON that is no completion",
}
COPIES = "--datasets DIR takes local copies"
FIELDS = "every line has to be JSON, with the fields that the data set has on the hub; in every split the same"
# Exceptions of loading data -> fact and hint.
DATA = {
    "DatasetNotFoundError": ("the data set is not on the hub, or not at that revision", COPIES),
    "RevisionNotFoundError": ("the data set has no such revision", COPIES),
    "OfflineModeIsEnabled": ("the data set is not here, and the hub may not be asked", COPIES),
    "LocalEntryNotFoundError": ("the hub cannot be reached", COPIES),
    "ConnectionError": ("the hub cannot be reached", COPIES),
    "ConnectError": ("the hub cannot be reached", COPIES),
    "DataFilesNotFoundError": ("there are no data files", FIELDS),
    "DatasetGenerationError": ("the data files cannot be read", FIELDS),
    "UndefinedError": ("the data files lack a field", FIELDS),
}


class Process(Protocol):
    """A program that runs, on the host or in a container."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""

    def stop(self) -> None:
        """Ends it, if it has not ended."""


@dataclass(frozen=True)
class Environment:
    """Where lm-eval is: in `program`, a folder of the host, or in `image`, of a daemon.

    A container sees the folder `work`, which it writes to, and what it `reads`; and the network, for the server.
    """

    work: Path
    program: Path | None = None
    engine: Engine | None = None
    image: str = ""
    reads: Sequence[Path] = field(default=())

    @property
    def python(self) -> str:
        return str(self.program / "python") if self.program else "python"

    def start(self, words: Sequence[str], variables: Mapping[str, str], log: Path) -> Process:
        """Starts a program whose output goes to `log`. Raises UserError where it cannot."""
        if self.program:
            return HostProcess(words, Network().for_programs(self.work) | dict(variables), log)
        assert self.engine
        job = Job(self.image, list(words), self.work, self.reads, online=True, name="", environment=variables)
        return ContainerProcess(self.engine, job, log)


class HostProcess:
    """In a session of its own, so that Ctrl-C comes to us alone; it ends when we do, however we do."""

    def __init__(self, words: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        try:
            with open(log, "ab") as file:
                self._process = subprocess.Popen(
                    list(words),
                    env={**os.environ, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=children.ending_with_us(signal.SIGKILL),
                )
        except OSError as error:
            hint = "make env-serve-cpu, or --program <the folder of lm-eval's python>"
            raise UserError(f"{words[0]} cannot be run: {error.strerror}", hint) from None

    def poll(self) -> int | None:
        return self._process.poll()

    def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                return
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)


class ContainerProcess:
    """A container that is removed in the end. One of a run that was killed still works there: it is removed first."""

    def __init__(self, engine: Engine, job: Job, log: Path) -> None:
        label = f"{job.work.absolute()}"
        try:
            for left in engine.client.containers.list(all=True, filters={"label": f"{RUN_LABEL}={label}"}):
                left.remove(force=True)
            options = jobs.options(job, engine.security, ulimits=())  # those are for NCCL
            options["labels"] = {RUN_LABEL: label}
            made = engine.client.containers.create(job.image, job.words[1:], **options)
            self._container: Container = made
            try:
                made.start()
            except (APIError, RequestException):
                self.stop()
                raise
        except ImageNotFound:
            raise refusals.no_image(job.image) from None
        except (APIError, RequestException) as error:
            raise refusals.refused(error, instead="--runtime host") from None
        self._copier = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self._copier.start()

    def _copy(self, log: Path) -> None:
        with suppress(DockerException, RequestException), open(log, "ab") as file:
            for piece in self._container.logs(stream=True, follow=True):
                file.write(piece)
                file.flush()

    def poll(self) -> int | None:
        try:
            self._container.reload()
        except (DockerException, RequestException) as error:
            raise refusals.gone(error) from None
        if self._container.status != "exited":
            return None
        self._copier.join(STOP_S)
        return int(self._container.attrs["State"]["ExitCode"])

    def stop(self) -> None:
        with suppress(DockerException, RequestException):
            self._container.remove(force=True)


@dataclass(frozen=True)
class Limits:
    """answer_s: for one answer; prepare_s: until the first is asked for, and after the last."""

    answer_s: float
    prepare_s: float = PREPARE_LIMIT_S


def run(
    environment: Environment,
    words: Sequence[str],
    variables: Mapping[str, str],
    log: Path,
    limits: Limits,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> str:
    """Runs lm-eval to its end -> the end of its output. progress: called with answers that came, and of how many.

    Raises UserError when it fails, and when for answer_s, and a little, no answer came.
    """
    begun = log.stat().st_size if log.exists() else 0
    process = environment.start(words, variables, log)
    seen, since_s = (0, 0), time.monotonic()
    try:
        while (code := process.poll()) is None:
            now = reached(tail(log, begun))
            if now != seen:
                seen, since_s = now, time.monotonic()
                progress(*seen)
            done, total = seen
            limit_s = limits.answer_s + GRACE_S if done < total else limits.prepare_s
            if time.monotonic() - since_s > limit_s:
                raise stalled(seen, limit_s)
            time.sleep(POLL_S)
    finally:
        process.stop()
    said = tail(log, begun)
    if code:
        raise explain(said, code, log)
    return said


def tail(log: Path, begun: int = 0) -> str:
    """The end of a log, of what was written after its first `begun` bytes."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(begun, size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def reached(said: str) -> tuple[int, int]:
    """How many answers came, of how many; (0, 0) before the first question."""
    found = PROGRESS.findall(said)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def cached(said: str) -> int:
    """How many answers lm-eval had from an earlier run."""
    return sum(map(int, CACHED.findall(said)))


def stalled(seen: tuple[int, int], limit_s: float) -> UserError:
    done, total = seen
    if not total or done == total:
        return UserError(f"lm-eval did nothing for {limit_s:.0f} s", "is the hub slow? --datasets takes local copies")
    fact = f"the server stalls: for {limit_s:.0f} s no answer came, after {done} of {total}"
    return UserError(fact, f"{LOGS}, or --request-timeout for a slow server; {AGAIN}")


def explain(said: str, code: int, log: Path) -> UserError:
    """The error of a run that ended with this exit code after saying this."""
    done, total = reached(said)
    came = f", after {done} of {total} answers" if total else ""
    names = RAISED.findall(said)
    if names and names[-1] in DATA and not total:
        fact, hint = DATA[names[-1]]
        return UserError(f"{fact} ({last_line(said)})", hint)
    # The cause is told at each attempt; when the last one fails, other connections break off too.
    likely = Counter(name for name in names if name in EXCEPTIONS or name == REFUSAL).most_common(1)
    refused = REFUSED.findall(said)
    if total and likely and likely[0][0] == REFUSAL and refused:
        status, text = refused[-1]
        return UserError(f"the server answered HTTP {status}, {short(text.strip())}{came}", f"{LOGS}, {AGAIN}")
    if total and likely and likely[0][0] in EXCEPTIONS:
        return UserError(f"{EXCEPTIONS[likely[0][0]]}{came}", f"{LOGS}, {AGAIN}")
    return UserError(f"lm-eval ended with {code}{came}: {last_line(said)}", f"its output is in {log}")


def last_line(said: str) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]", said) if line.strip()]
    return short(lines[-1]) if lines else "it said nothing"


@dataclass(frozen=True)
class Asked:
    """What a run asks of whom, besides its task: at most `limit` questions of each part, `max_tokens` of an answer."""

    url: str
    model: str
    tokenizer: str
    seed: int
    fewshot_seed: int
    concurrency: int
    attempts: int
    timeout_s: float
    max_tokens: int
    limit: int | None


def command(program: Sequence[str], task: Task, asked: Asked, tasks: Path, folder: Path) -> list[str]:
    """lm-eval's command line. program: what starts it; tasks: the derived ones; folder: where results and the cache of
    answers go."""
    chat = task.api == "chat"
    model: dict[str, Any] = {
        "base_url": f"{asked.url}/v1/{'chat/completions' if chat else 'completions'}",
        "model": asked.model,
        "tokenizer_backend": "huggingface" if task.scores_prompts else "none",
        "tokenized_requests": False,
        "num_concurrent": asked.concurrency,
        "max_retries": asked.attempts,
        "timeout": math.ceil(asked.timeout_s),
        "max_gen_toks": asked.max_tokens,
        "seed": asked.seed,
    }
    if task.scores_prompts:
        model |= {"tokenizer": asked.tokenizer, "max_length": task.context}
    words = [*program, "run", "--model", "local-chat-completions" if chat else "local-completions"]
    words += ["--model_args", json.dumps(model), "--tasks", task.lm_eval, "--include_path", str(tasks)]
    words += ["--num_fewshot", str(task.fewshot), "--batch_size", "1"]
    words += ["--gen_kwargs", json.dumps({"temperature": 0, "do_sample": False})] if not task.scores_prompts else []
    words += ["--seed", f"0,1234,1234,{asked.fewshot_seed}"]
    words += ["--apply_chat_template", "--fewshot_as_multiturn", "true"] if chat else []
    words += ["--limit", str(asked.limit)] if asked.limit is not None else []
    words += ["--predict_only"] if task.runs_code else []
    return [*words, "--log_samples", "--output_path", str(folder / "results"), "--use_cache", str(folder / "cache")]
