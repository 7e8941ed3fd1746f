"""Acceptance rate and length of drafts, by position and kind of text: random tokens, code, chats, prose.

The server's own counters are read before and after each request, so nobody else may use it meanwhile. Beside the result
lies what was written, a .jsonl for each workload, for `python -m scripts.verify --tokens` to judge place by place.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from v4forge.bench import acceptance, published_figures, results, workloads
from v4forge.bench.acceptance import Kept, Sampling
from v4forge.bench.results import Measurement
from v4forge.bench.served_model import Target, sha256_of
from v4forge.bench.session import Session, conclude
from v4forge.bench.standing import Worth, worth_of
from v4forge.bench.terms import acceptance_length
from v4forge.bench.workloads import RANDOM, WORKLOADS, Prompt
from v4forge.errors import UserError
from v4forge.serving.launch import say

from . import benching
from .cli import steps

FEWEST_TOKENS = 8  # of an answer: fewer leave no room for drafts
ROUGH_TOK_S = 88  # of the published original for one reader: only for how long it may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument_group("drafts").add_argument
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
        help=f"some of: {' '.join(WORKLOADS)}; default: all")  # fmt: skip
    add("--tokens", type=int, default=workloads.ANSWER_TOKENS, metavar="N",
        help="of an answer, at most; default: %(default)s")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="T", help="of sampling; default: 0, greedy")
    add("--thinking", action="store_true", help="let the model think before it answers a chat")
    add("--offline", type=Path, metavar="FILE",
        help="a certificate with figures of verify --deep; default: that of what is served")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    check(args)
    if args.dry_run:
        dry_run(args)
        return 0
    session = benching.session_of(args)
    with session.served() as target:
        return measure(session, args, target)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for numbers that cannot be."""
    benching.check(args)
    for name, least in (("tokens", FEWEST_TOKENS), ("temperature", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} is too small", f"--{name} {least} or more")


def counts(args: argparse.Namespace) -> dict[str, int]:
    """workload -> how many prompts."""
    whole = {
        name: workloads.RANDOM_PROMPTS if name == RANDOM else len(workloads.written(name)) for name in args.workloads
    }
    return {name: min(count, args.limit or count) for name, count in whole.items()}


def dry_run(args: argparse.Namespace) -> None:
    """Says what would be asked, and how long that would take at the published speed."""
    requests = counts(args)
    total = sum(requests.values())
    tokens = total * args.tokens
    minutes = tokens / ROUGH_TOK_S / 60
    say(f"{total} requests, one at a time: {', '.join(f'{count} {name}' for name, count in requests.items())}")
    say(f"{tokens:,} tokens of answers at most, about {minutes:.0f} minutes at the published {ROUGH_TOK_S} tok/s")


def measure(session: Session, args: argparse.Namespace, target: Target) -> int:
    """Counts the drafts of every workload that is missing, says what they come to; the exit code."""
    k = acceptance.depth(target)
    target.wait_until_idle()
    given = acceptance.offline(target.facts["artifact"], k, args.offline)
    prompts = {name: prompts_of(name, args, target)[:count] for name, count in counts(args).items()}
    sampling = Sampling(args.tokens, args.temperature, args.seed, args.thinking)
    opened = session.begin(target, settings(args, k), vars(sampling), hashes(prompts))
    before = dict(zip(prompts, accumulate(map(len, prompts.values()), initial=0), strict=False))
    with steps("draft", sum(map(len, prompts.values())), "prompts") as progress:

        def one(workload: str) -> Mapping[str, Any]:
            def step(number: int) -> None:
                progress(before[workload] + number, workload)

            part = answered(opened, target, workload, prompts[workload], sampling, args.request_timeout, step)
            return part | {"offline": acceptance.beside(part, given) if given else None}

        results.measured(opened, list(prompts), one)
    show(opened, k)
    return conclude(opened)


def prompts_of(workload: str, args: argparse.Namespace, target: Target) -> list[Prompt]:
    """A workload's prompts. Raises UserError where the tokenizer, of which random ones are drawn, is not here."""
    if workload != RANDOM:
        return workloads.written(workload)
    artifact = target.facts["artifact"]
    folder = Path(artifact["folder"] if artifact else args.artifact)
    return workloads.drawn(workloads.vocabulary(folder).drawable, args.seed)


def settings(args: argparse.Namespace, k: int) -> dict[str, Any]:
    """What decides the figures, besides prompts and sampling."""
    shape = {"prompts": workloads.RANDOM_PROMPTS, "tokens": workloads.PROMPT_TOKENS, "ignore_eos": True}
    return {
        "workloads": list(args.workloads),
        "drafts": k,
        "concurrency": 1,
        "stream": False,
        "output_tokens": args.tokens,
        "random": shape if RANDOM in args.workloads else None,
    }


def hashes(prompts: Mapping[str, Sequence[Prompt]]) -> dict[str, str]:
    """Of each file of prompts, and of the random ones as they are sent."""
    return {
        name: sha256_of([each.asked for each in some]) if name == RANDOM else sha256_of(workloads.file_of(name))
        for name, some in prompts.items()
    }


def answered(
    opened: Measurement,
    target: Target,
    workload: str,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    limit_s: float,
    step: Callable[[int], None],
) -> dict[str, Any]:
    """One workload's part. What was answered before an error is kept, and the next run goes on behind it."""
    kept = Kept(opened.path.with_name(f"{opened.path.stem}-{workload}.jsonl"))
    if [each.id for each in kept.answers] != [each.id for each in prompts[: len(kept.answers)]]:
        raise UserError(f"{kept.path} holds answers to other prompts", f"rm {kept.path}, or run with --fresh")
    target.wait_until_idle()
    for number in range(len(kept.answers), len(prompts)):
        step(number)
        try:
            kept.add(acceptance.count(target, prompts[number], number, sampling, limit_s))
        except UserError as error:
            there = f"{number} of {len(prompts)} prompts are kept, and the same command goes on"
            raise UserError(error.fact, f"{error.hint}; {there}") from None
    part = acceptance.figures(workload, kept.answers)
    return part | {"answers": kept.path.name, "answers_sha256": sha256_of(kept.path)}


def show(opened: Measurement, k: int) -> None:
    """The table; what the offline figures are, or how they are made; how our own forward judges the same tokens."""
    parts = {name: part for name in WORKLOADS if (part := opened.part(name)) is not None}
    if not parts:
        return
    Console(highlight=False).print(table(parts, k, worth_of(opened.content)))
    folder = (opened.content["target"]["artifact"] or {}).get("folder") or "DIR"
    verify = f"python -m scripts.verify --artifact {shlex.quote(folder)} --source DIR"
    if offline := offline_of(parts):
        say(f"offline: verify --deep, {offline['tokens']:,} tokens, {offline['source']}")
        say(f"they may differ: {offline['why']}")
    else:
        say(f"no offline figures of this artifact for k={k}: {verify} --deep 8192")
    answers = opened.path.with_name(next(iter(parts.values()))["answers"])
    say(f"the same tokens, judged place by place: {verify} --tokens {shlex.quote(str(answers))}")


def offline_of(parts: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The offline figures, which are the same beside every workload."""
    return next((part["offline"] for part in parts.values() if part["offline"]), None)


def table(parts: Mapping[str, Mapping[str, Any]], k: int, worth: Worth) -> Table:
    """A column a workload, and one for the offline figures: shares in percent, below each its 95% interval."""
    offline = offline_of(parts)
    caption = "\n".join(("95% intervals over prompts", *worth.marks))
    drawn = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, collapse_padding=True)
    drawn.add_column("", no_wrap=True)
    for name in (*parts, "offline") if offline else parts:
        drawn.add_column(name, justify="right", no_wrap=True)

    def row(heading: str, cell: Callable[[Mapping[str, Any]], str], last: str = "") -> None:
        drawn.add_row(heading, *map(cell, parts.values()), *([last] if offline else []))

    row("prompts", lambda part: f"{part['prompts']}", f"{offline['sequences']}" if offline else "")
    row("tokens", lambda part: f"{part['tokens']:,}", f"{offline['tokens']:,}" if offline else "")
    row("steps", lambda part: f"{part['drafts']:,}")
    row("acceptance rate", lambda part: percent(part["acceptance"]), percent(offline["acceptance"]) if offline else "")
    row("acceptance length", lambda part: f"{acceptance_length(part['accepted'], part['drafts']):.2f}")
    if offline:
        row("against offline", lambda part: points(part["offline"] and part["offline"]["difference"]["acceptance"]))
    if worth.published_model:
        originals = {name: published_figures.by_key()[f"draft/{name}"].original for name in parts}
        shown = [f"{each.value:.1f}%" if each else "-" for each in originals.values()]
        drawn.add_row("published, k=1", *shown, *([""] if offline else []))
    for at in range(k):
        same = percent(offline["given_earlier"][0]) if offline and not at else ""
        row(f"position {at + 1}", lambda part, at=at: percent(part["by_position"][at]), same)  # type: ignore[misc]
    for at in range(1, k):
        known = percent(offline["given_earlier"][at]) if offline else ""
        heading = f"position {at + 1}, if {at}"
        row(heading, lambda part, at=at: percent(part["given_earlier"][at]), known)  # type: ignore[misc]
    return drawn


def percent(told: Mapping[str, float | None]) -> str:
    """A share, and below it the ends of its interval."""
    if (value := told["value"]) is None:
        return "-"
    low, high = told["low"], told["high"]
    return f"{value:.1%}" if low is None or high is None else f"{value:.1%}\n[dim]{100 * low:.1f}..{100 * high:.1f}[/]"


def points(told: Mapping[str, float | None] | None) -> str:
    """A difference of shares in percentage points, and below it the ends of its interval; - where there is none."""
    if not told or (value := told["value"]) is None:
        return "-"
    low, high = told["low"], told["high"]
    ends = "" if low is None or high is None else f"\n[dim]{100 * low:+.0f}..{100 * high:+.0f}[/]"
    return f"{100 * value:+.1f}{ends}"
