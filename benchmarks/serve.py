"""Measures an artifact served by vLLM over HTTP with k = 0, 1, 2, 3 drafts: correctness, acceptance, time per token.

    python -m benchmarks.serve --artifact scratch/tiny/artifact --out benchmarks/results/serve-tiny

Starts one `vllm serve` for each k, with the settings of docker/serve/settings.toml and --set on top. Each continues the
same prompts greedily; this project's own forward then goes over what they wrote: is each token its most likely one, how
far are the log-probabilities, were as many drafts accepted as it expects. The servers take turns in streaming, one
request at a time on the machine: milliseconds per output token; then, with --concurrency, in answering several random
prompts at a time: tokens a second. --out gets a .json and, for `scripts.verify --tokens`,
a .jsonl of each server's tokens. Exit code 1 when a server fails or is not within what serve_forward.py states.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import serve_forward
from benchmarks.machine import machine
from benchmarks.serve_client import Server, gpu_memory, tpot
from benchmarks.serve_figures import compare, table, within
from benchmarks.serve_load import random_prompts, tokens_a_second
from scripts.cli import parser_for
from v4forge.checkout import ROOT
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError, run_main
from v4forge.files import write_json, write_text
from v4forge.model import heldout
from v4forge.serving.settings import DRAFTS, TENSOR_PARALLEL, serving

TINY = ROOT / "models" / "tiny"
SCRATCH = Path("scratch")
SHOWN = ("drafts", "gpus", "ready_s", "gpu_gib", "failure")


def servers_of(args: argparse.Namespace) -> list[Server]:
    """A server for each of --drafts, on the next GPUs in turn."""
    wide = args.tensor_parallel
    rows = [args.gpus[start : start + wide] for start in range(0, len(args.gpus) - wide + 1, wide)]
    if not rows:
        raise UserError(f"--tensor-parallel {wide} needs {wide} GPUs", f"--gpus {' '.join(map(str, range(wide)))}")
    found = []
    for number, k in enumerate(args.drafts):
        overrides = dict(args.set) | {DRAFTS: str(k), TENSOR_PARALLEL: str(wide)}
        settings = serving(args.profile, args.backend, overrides)
        log = args.logs / f"{args.out.name}-{number}.log"
        gpus = rows[number % len(rows)]
        found.append(Server(shlex.split(args.vllm), args.artifact, settings, gpus, log, args.cache))
    return found


@contextmanager
def running(servers: Sequence[Server], limit_s: float) -> Iterator[None]:
    """Starts them together and waits for all; stops them at the end. A `failure` says which do not run, and why."""
    try:
        for each in servers:
            each.start()
        for each in servers:
            if each.wait(limit_s):
                each.found["gpu_gib"] = gpu_memory(each)
                each.found["vllm"] = json.loads(each.get("/version"))["version"]
            say("server", {name: each.found.get(name) for name in SHOWN})
        yield
    finally:
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(Server.stop, servers))


def say(what: str, facts: Any) -> None:
    print(what, json.dumps(facts), flush=True)


def attempt(server: Server, work: Callable[[Server], None]) -> None:
    """One server's part; its failure is noted, and the others go on."""
    if not server.failure:
        try:
            work(server)
        except UserError as error:
            server.failed(error.fact)


def write(server: Server, prompts: Sequence[Sequence[int]], count: int) -> None:
    """The server's answers, one request at a time, and what its counters say of each; then a chat."""
    before = server.drafts()
    for prompt in prompts:
        server.answers.append(server.complete(prompt, count))
        now = server.drafts()
        server.counted.append(now.since(before))
        before = now
    server.found["chat"] = chat(server)


def chat(server: Server) -> dict[str, Any]:
    """A chat through tokenizer and reasoning parser; what a small model says in it does not matter."""
    asked = {"messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 48, "temperature": 0}
    answer = server.post("/v1/chat/completions", asked)
    message = answer["choices"][0]["message"]
    characters = {name: len(message.get(name) or "") for name in ("content", "reasoning")}
    return {"completion_tokens": answer["usage"]["completion_tokens"], "characters": characters}


def stream(server: Server, prompt: Sequence[int], count: int) -> None:
    """Adds one streamed answer's times: a token, the first one, a step of the model, which may write several tokens."""
    before = server.drafts()
    pieces = server.stream(prompt, count)
    steps = server.drafts().since(before).steps or count - 1
    times = server.found["times"]
    times["token_ms"].append(tpot(pieces))
    times["first_ms"].append(1000 * pieces[0][0])
    times["step_ms"].append(tpot(pieces) * (count - 1) / steps)


def warm(server: Server, prompt: Sequence[int]) -> None:
    server.stream(prompt, 16)
    server.found["times"] = {"token_ms": [], "first_ms": [], "step_ms": []}


def measure(servers: Sequence[Server], prompts: Sequence[Sequence[int]], args: argparse.Namespace) -> None:
    """Answers and times of running servers: all write at once, then each streams alone."""
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(lambda each: attempt(each, lambda s: write(s, prompts, args.tokens)), servers))
    for each in servers:
        attempt(each, lambda s: warm(s, prompts[0]))
    for _ in range(args.rounds):
        for prompt in prompts[: args.streams]:
            for each in servers:
                attempt(each, lambda s, p=prompt: stream(s, p, args.tokens))  # type: ignore[misc]
    random = random_prompts(max(args.concurrency, default=0), args.load_tokens, args.vocabulary, 0)
    for _ in range(args.load_rounds):
        for concurrency in args.concurrency:
            for each in servers:
                attempt(each, lambda s, c=concurrency: load(s, c, random, args.load_tokens))  # type: ignore[misc]


def load(server: Server, concurrency: int, prompts: list[list[int]], count: int) -> None:
    """Adds a round of the server's tokens a second at so many requests at a time."""
    row = tokens_a_second(server, concurrency, prompts, count)
    server.found.setdefault("loads", []).append(row)
    say("load", {"k": server.settings.drafts, **row})


def judge(server: Server, prompts: Tensor, args: argparse.Namespace) -> None:
    """What our forward says of the server's answers."""
    ids, logprobs = serve_forward.alternatives(server.answers)
    text = torch.cat((prompts, ids[:, :, 0]), 1)
    checkpoint = Checkpoint(args.artifact, form="artifact")
    ours = serve_forward.forward(checkpoint, text, ids, torch.device(args.device))
    server.found["agreement"] = serve_forward.agreement(ours, ids, logprobs)
    if server.settings.drafts:
        server.found["acceptance"] = serve_forward.drafts_table(server.counted, ours, text, prompts.shape[1])
        server.found["counted"] = [[each.steps, *each.accepted] for each in server.counted]


def option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not <option>=<value>")
    return name, value


def arguments() -> argparse.Namespace:
    parser = parser_for("serve", __doc__)
    parser.prog = "python -m benchmarks.serve"
    add = parser.add_argument
    add("--artifact", type=Path, required=True, metavar="DIR", help="what to serve")
    add("--out", type=Path, required=True, metavar="FILE", help="gets FILE.json and FILE-<n>.jsonl")
    add("--drafts", type=int, nargs="+", default=[0, 1, 2, 3], metavar="K", help="a server each (default: 0 1 2 3)")
    add("--gpus", type=int, nargs="+", default=[0], metavar="N", help="dealt to the servers in turn (default: 0)")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of a server (default: %(default)s)")
    add("--together", type=int, default=0, metavar="N", help="servers that run at a time (default: all)")
    add("--profile", default="published", help="of settings.toml (default: %(default)s)")
    add("--backend", default="cuda", help="of settings.toml (default: %(default)s)")
    add("--set", type=option, action="append", default=[], metavar="OPTION=VALUE", help="another value of a setting")
    add("--prompts", type=Path, default=TINY / "heldout.txt", metavar="FILE", help="text (default: models/tiny's)")
    add("--count", type=int, default=32, help="prompts (default: %(default)s)")
    add("--prompt-tokens", type=int, default=32, help="tokens of a prompt (default: %(default)s)")
    add("--tokens", type=int, default=256, help="tokens of an answer (default: %(default)s)")
    add("--streams", type=int, default=8, help="prompts that are streamed for times (default: %(default)s)")
    add("--rounds", type=int, default=3, help="times that each of them is (default: %(default)s)")
    add("--concurrency", type=int, nargs="*", default=[], metavar="N", help="requests at a time, for tokens a second")
    add("--load-rounds", type=int, default=3, help="turns of the servers in that (default: %(default)s)")
    add("--load-tokens", type=int, default=256, help="of such a prompt, and of its answer (default: %(default)s)")
    add("--like", type=Path, metavar="FILE", help="a .jsonl of another run, with which the tokens are compared")
    add("--vllm", default="vllm", metavar="COMMAND", help="what starts vLLM (default: %(default)s)")
    add(
        "--cache", type=Path, default=Path("scratch/serve-cache"), metavar="DIR", help="what vLLM compiles is kept here"
    )
    add("--logs", type=Path, default=Path("scratch/serve-logs"), metavar="DIR", help="the servers' logs")
    add("--limit", type=float, default=480, metavar="S", help="for a start, in seconds (default: %(default)s)")
    add(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of our forward (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.artifact, args.cache = args.artifact.absolute(), args.cache.absolute()
    args.vocabulary = Checkpoint(args.artifact, form="artifact").config.vocab_size
    prompts = heldout.tokens(args.artifact, args.prompts, args.count, args.prompt_tokens, args.vocabulary)
    like = [line["token_ids"] for line in map(json.loads, args.like.read_text().splitlines())] if args.like else []
    servers = servers_of(args)
    step = args.together or len(servers)
    for group in (servers[start : start + step] for start in range(0, len(servers), step)):
        with running(group, args.limit):
            measure(group, prompts.tolist(), args)
        for each in group:
            say("times", {"drafts": each.settings.drafts, "failure": each.failure} | each.found.get("times", {}))
    for each in servers:  # the GPUs are free again
        attempt(each, lambda s: judge(s, prompts, args))
    compare(servers, like)
    for number, each in enumerate(servers):
        lines = zip(prompts.tolist(), each.answers, strict=False)
        text = "".join(json.dumps({"prompt_token_ids": p, "token_ids": a.tokens}) + "\n" for p, a in lines)
        write_text(args.out.with_name(f"{args.out.name}-{number}.jsonl"), text)
    ok = all(within(each) for each in servers)
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.serve", *sys.argv[1:]]),
        **machine(torch.device(args.device)),
        "prompts": {"count": args.count, "tokens": args.prompt_tokens, "answer_tokens": args.tokens},
        "stated": {"least_same": serve_forward.LEAST_SAME, "most_off_nats": serve_forward.MOST_OFF},
        "within": ok,
        "servers": [each.found for each in servers],
    }
    write_json(args.out.with_name(args.out.name + ".json"), result)
    Console(width=120).print(table(servers))
    print("all within what is stated" if ok else "NOT within what is stated")
    return 0 if ok else 1


if __name__ == "__main__":
    run_main(main)
