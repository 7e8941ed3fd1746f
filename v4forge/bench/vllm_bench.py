"""Load on a server: `vllm bench serve` of a host's program or of the image, which sends prompts and takes the times."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge.errors import UserError
from v4forge.files import read_json, write_text
from v4forge.images import containers, jobs
from v4forge.images.jobs import Job
from v4forge.network import Network
from v4forge.serving import client
from v4forge.serving.client import LOGS, Endpoint

PROMPTS, RESULT, LOG = "prompts.jsonl", "result.json", "client.log"
# For the client: nothing is looked up elsewhere, and what stands between here and the network is not for a server that
# is measured; a name and password for its host would take the place of the key.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "NO_PROXY": "*",
    "no_proxy": "*",
    "NETRC": os.devnull,
}
NEEDS = "make env-serve-cpu, make images IMAGE=serve, or --runtime host --program <folder of vllm>"
VERSION = "import importlib.metadata; print(importlib.metadata.version('vllm'))"


@dataclass(frozen=True)
class Client:
    """Where `vllm` is: in the folder `program` of this machine, or in an image."""

    program: str = ""
    image: str = ""

    def words(self, command: Sequence[str], folder: Path, reads: Sequence[Path], key: str) -> Words:
        """A command of that environment, which writes to `folder` and reads `reads`. The key, if there is one, is in
        the variables, where `ps` does not show it."""
        variables = ENVIRONMENT | ({"OPENAI_API_KEY": key} if key else {})
        if not self.image:
            kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_API_KEY", "API_KEY")}
            kept |= Network().for_programs(folder)
            return Words([f"{self.program}/{command[0]}", *command[1:]], kept | variables)
        home = {"HOME": "/tmp", "HF_TOKEN": ""}
        job = Job(self.image, list(command), folder, reads, online=True, environment=variables | home)
        name = f"v4forge-load-{secrets.token_hex(4)}"
        words = jobs.command_line(job, containers.connect().security, f"--name={name}")
        return Words(words, os.environ | jobs.environment(job), name)

    def version(self, folder: Path) -> str:
        """Of vLLM there. Raises UserError where there is none."""
        words = self.words(["python", "-c", VERSION], folder, (), "")
        try:
            said = subprocess.run(words.command, env=words.variables, capture_output=True, text=True)
            found, why = said.stdout.strip(), _last_line(said.stderr)
        except OSError as error:
            found, why = "", error.strerror or str(error)
        if not found:
            where = self.image or self.program
            raise UserError(f"there is no vllm in {where}, which sends the requests: {why}", NEEDS)
        return found


@dataclass(frozen=True)
class Words:
    """A command with its environment; `container` is the name of the one that it runs in."""

    command: list[str]
    variables: Mapping[str, str]
    container: str = ""


@dataclass(frozen=True)
class Load:
    """Requests to a model: `concurrency` at a time, or `rate` a second with the gaps of a Poisson process; each answer
    of exactly `output_tokens`. `slo_ms`: what a good request keeps to, ttft and tpot."""

    url: str
    model: str
    prompts: Sequence[str]
    output_tokens: int
    concurrency: int | None
    slo_ms: Mapping[str, float]
    seed: int
    rate: float | None = None

    def command(self, tokenizer: Path, folder: Path) -> list[str]:
        """`vllm bench serve` of this load, with its prompts and its result in `folder`."""
        options = {
            "backend": "openai",
            "base-url": self.url,
            "endpoint": "/v1/completions",
            "model": self.model,
            "tokenizer": tokenizer,
            "dataset-name": "custom",
            "dataset-path": folder / PROMPTS,
            "custom-output-len": self.output_tokens,
            "num-prompts": len(self.prompts),
            **({"max-concurrency": self.concurrency} if self.rate is None else {"request-rate": f"{self.rate:g}"}),
            "temperature": 0,
            "seed": self.seed,
            "percentile-metrics": "ttft,tpot,itl,e2el",
            "result-dir": folder,
            "result-filename": RESULT,
        }
        switches = ("disable-shuffle", "skip-chat-template", "no-oversample", "ignore-eos", "disable-tqdm")
        goodput = [f"{name}:{limit:g}" for name, limit in self.slo_ms.items()]
        return [
            *("vllm", "bench", "serve"),
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
            *(f"--{name}" for name in (*switches, "save-result", "save-detailed")),
            *("--goodput", *goodput),
        ]


def lines(prompts: Sequence[str]) -> str:
    """The prompts as the client reads them from a file."""
    return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)


def warm_up(at: Endpoint, load: Load, limit_s: float) -> None:
    """Sends the prompts of a load all at once and throws the answers away, so that what is compiled or filled for such
    requests is. Raises the first UserError."""
    fixed = {"model": load.model, "max_tokens": load.output_tokens, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(len(load.prompts)) as pool:
        bodies = [{**fixed, "prompt": prompt} for prompt in load.prompts]
        for answer in [pool.submit(client.fetch, at, "/v1/completions", body, limit_s) for body in bodies]:
            answer.result()


def measure(client: Client, load: Load, tokenizer: Path, folder: Path, key: str, limit_s: float) -> dict[str, Any]:
    """What `vllm bench serve` writes about a load, in detail. Raises UserError when it fails or takes longer."""
    write_text(folder / PROMPTS, lines(load.prompts))
    (folder / RESULT).unlink(missing_ok=True)
    words = client.words(load.command(tokenizer, folder), folder, [tokenizer], key)
    code = _run(words, folder / LOG, limit_s, f"{len(load.prompts)} requests to {load.url}")
    result = read_json(folder / RESULT)
    if code or not result:
        said = _last_line((folder / LOG).read_text(encoding="utf-8", errors="replace"))
        raise UserError(f"vllm bench serve failed: {said.replace(key, '…') if key else said}", LOGS)
    return result


def _run(words: Words, log: Path, limit_s: float, what: str) -> int:
    try:
        with open(log, "wb") as file:
            process = subprocess.Popen(
                words.command,
                env=words.variables,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise UserError(f"{words.command[0]} cannot be run: {error.strerror}", NEEDS) from None
    with _ended(process, words.container):
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            hint = f"{LOGS}: does it still answer? or allow more: --point-timeout {2 * limit_s:.0f}"
            raise UserError(f"{what} were not answered within {limit_s:.0f} s", hint) from None


@contextmanager
def _ended(process: subprocess.Popen[bytes], container: str) -> Iterator[None]:
    """Whatever happens in the block, the process and those that it began are gone after it."""
    try:
        yield
    finally:
        if process.poll() is None:
            if container:
                subprocess.run(["docker", "rm", "--force", container], capture_output=True)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _last_line(text: str) -> str:
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return said[-1] if said else "it said nothing"
