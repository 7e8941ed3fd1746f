"""Serves the artifact and upstream's own checkpoint for benchmarks.full_depth: times, tokens a second, their ratios."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.serve import attempt, load, option, running, say, stream, warm
from benchmarks.serve_client import Server
from benchmarks.serve_load import random_prompts
from v4forge.checkpoint.reader import Checkpoint
from v4forge.intervals import Estimate, ratio
from v4forge.serving.settings import DRAFTS, TENSOR_PARALLEL, serving

# Of the published artifact on two GH200: drafts accepted at each position, from the mean rates at k = 1, 2, 3
# (90.8, 81.9 and 71.1% of k drafts; public report of 2026).
ACCEPTED = (0.908, 0.730, 0.495)
# Drafts accepted at k = 1, published with the artifact by text.
PUBLISHED = {"random tokens": 0.6994, "chat": 0.8190, "code": 0.9291}
FOLDERS = ("artifact", "upstream")
SYNTHETIC = {"speculative-config.rejection_sample_method": "synthetic"}
TIMES = ("token_ms", "step_ms", "first_ms")
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A way to serve a folder: k drafts a step; `experts` is vLLM's --moe-backend, "" its own choice."""

    folder: str
    k: int
    experts: str

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.folder, f"k{self.k}", self.experts)))


def cases(drafts: Sequence[int], backends: Sequence[str]) -> Iterator[tuple[Case, ...]]:
    """Those that are compared with each other: the same k and experts' kernels, of both folders."""
    for k in drafts:
        for experts in backends if k == 0 else backends[:1]:
            yield tuple(Case(folder, k, experts) for folder in FOLDERS)


def server_of(case: Case, args: argparse.Namespace) -> Server:
    overrides = dict(map(option, args.set)) | {DRAFTS: str(case.k), TENSOR_PARALLEL: str(len(args.gpus))}
    if case.k:
        rates = ",".join(map(str, ACCEPTED[: case.k]))
        overrides |= SYNTHETIC | {"speculative-config.synthetic_acceptance_rates": f"[{rates}]"}
    if case.experts:
        overrides["moe-backend"] = case.experts
    settings = serving("published", args.backend, overrides)
    log = args.out.parent / "logs" / f"{args.out.stem}-{case.name}.log"
    return Server(shlex.split(args.vllm), args.work / case.folder, settings, args.gpus, log, args.cache)


def measured(args: argparse.Namespace, rows: list[Row], save: Callable[[], None]) -> None:
    """Adds a row a case to `rows`, unless it is there without a failure."""
    vocabulary = Checkpoint(args.work / "upstream").config.vocab_size
    prompts = random_prompts(args.streams, args.prompt_tokens, vocabulary, 7)
    loaded = random_prompts(max(args.concurrency, default=0), args.prompt_tokens, vocabulary, 8)
    for pair in cases(args.drafts, args.backends):
        done = {row["name"] for row in rows if not row.get("failure")}
        todo = [case for case in pair if case.name not in done]
        for group in [todo] if args.together and todo else [[case] for case in todo]:
            servers = {case: server_of(case, args) for case in group}
            with running(list(servers.values()), args.limit):
                _stream(list(servers.values()), prompts, args.tokens)
                for concurrency in args.concurrency:
                    for each in servers.values():
                        attempt(each, lambda s, c=concurrency: load(s, c, loaded, args.tokens))  # type: ignore[misc]
            rows[:] = [row for row in rows if row["name"] not in {case.name for case in group}]
            rows += [_row(case, each) for case, each in servers.items()]
            save()


def _stream(servers: Sequence[Server], prompts: Sequence[Sequence[int]], count: int) -> None:
    """Every prompt to every server in turns, one request on the GPUs at a time; before that, each reads all of them."""
    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(lambda each: attempt(each, lambda s: warm(s, prompts[0])), servers))
    for prompt in prompts:
        for each in servers:
            attempt(each, lambda s, p=prompt: stream(s, p, count))  # type: ignore[misc]


def _row(case: Case, server: Server) -> Row:
    found = server.found | {"name": case.name, "folder": case.folder, "k": case.k, "experts": case.experts}
    if server.failure:
        return found | {"failure": server.failure}
    found["medians"] = {name: median(found["times"][name]) for name in TIMES}
    if case.k:
        step = found["medians"]["step_ms"]
        found["accepted_rates"] = ACCEPTED[: case.k]
        # A step writes the token behind the accepted drafts too.
        texts = {text: step / (1 + rate) for text, rate in PUBLISHED.items()} if case.k == 1 else {}
        found["token_ms_by_text"] = texts | {"public run": step / (1 + sum(ACCEPTED[: case.k]))}
    say("times", {"name": case.name, **found["medians"]})
    return found


def beside(mine: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The ratio of two servers' times, prompt by prompt, with its 95% interval: by the mean of the logarithms."""
    logs = np.log(np.asarray(mine) / np.asarray(theirs))
    return ratio(logs, np.ones(len(logs))).interval().mapped(math.exp)


def table(rows: Sequence[Row]) -> Table:
    """A row a case; `beside upstream` is the artifact's time a step over upstream's, of the same k and kernels."""
    shown = Table(box=box.SIMPLE_HEAD, title="Artifact and upstream's own checkpoint", title_justify="left")
    for name in ("", "ready s", "GiB", "step ms", "TPOT ms", "TTFT ms", "tok/s by requests", "step beside upstream"):
        shown.add_column(name, justify="left" if not name else "right")
    for row in rows:
        if row.get("failure"):
            shown.add_row(row["name"], row["failure"])
            continue
        other = next((r for r in rows if r["name"] == row["name"].replace("artifact", "upstream", 1)), row)
        cell = ""
        if other is not row and not other.get("failure"):
            told = beside(row["times"]["step_ms"], other["times"]["step_ms"])
            cell = f"{told.value:.3f} ({told.low:.3f}..{told.high:.3f})"
        middle = row["medians"]
        loads = ", ".join(f"{each['concurrency']}: {each['output_tok_s']:.0f}" for each in row.get("loads", ()))
        shown.add_row(
            row["name"],
            f"{row['ready_s']:.0f}",
            f"{row.get('gpu_gib') or 0:.1f}",
            *(f"{middle[name]:.2f}" for name in ("step_ms", "token_ms", "first_ms")),
            loads,
            cell,
        )
    return shown
