"""How many drafts are accepted, overall and by position: random tokens, code, chats, prose, each prompt by itself.

The server's own counters are read before and after each request, so nobody else may use it meanwhile. Beside the result
lies what was written, a .jsonl for each workload, for `python -m scripts.verify --tokens` to judge place by place.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scripts import benching
from scripts.cli import steps
from scripts.serve import say
from v4forge import acceptance, measurement, published, workloads
from v4forge.acceptance import Kept, Sampling
from v4forge.errors import UserError
from v4forge.measurement import Measurement
from v4forge.target import Target, sha256_of
from v4forge.workloads import RANDOM, WORKLOADS, WRITTEN, Prompt

# For the dry run's guess: the published original at one request.
TOKENS_PER_S = 88.0
FLASH = {"num_hidden_layers": 43, "hidden_size": 4096}
NOT_FLASH = "not DeepSeek-V4-Flash on a GPU, a test of the bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("drafts")
    add = group.add_argument
    add(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=list(WORKLOADS),
        metavar="NAME",
        help="default: %(default)s",
    )
    add("--tokens", type=int, default=workloads.ANSWER_TOKENS, help="of an answer, at most; default: %(default)s")
    add("--random-prompts", type=int, default=workloads.RANDOM_PROMPTS, metavar="N", help="default: %(default)s")
    add("--random-tokens", type=int, default=workloads.PROMPT_TOKENS, metavar="N", help="of each; default: %(default)s")
    add("--temperature", type=float, default=0.0, help="default: %(default)s, greedy")
    add("--thinking", action="store_true", help="chats think first")
    add(
        "--offline",
        type=Path,
        metavar="FILE",
        help="a certificate.json with figures of verify --deep (default: that of the artifact which is served)",
    )


def run(args: argparse.Namespace) -> int:
    check(args)
    if args.dry_run:
        dry_run(args)
        return 0
    with benching.served(args) as target:
        return measure(args, target)


def check(args: argparse.Namespace) -> None:
    """Raises UserError for numbers that cannot be, and prompts that cannot be read."""
    benching.check(args)
    for name, least in (("tokens", 8), ("random_prompts", 1), ("random_tokens", 1), ("temperature", 0)):
        if getattr(args, name) < least:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} {getattr(args, name)} is too small", f"{option} {least} or more")
    for workload in WRITTEN:
        workloads.written(workload)


def counts(args: argparse.Namespace) -> dict[str, int]:
    """workload -> how many prompts."""
    whole = {name: len(workloads.written(name)) if name in WRITTEN else args.random_prompts for name in args.workloads}
    return {name: min(count, args.limit or count) for name, count in whole.items()}


def dry_run(args: argparse.Namespace) -> None:
    requests = counts(args)
    listed = ", ".join(f"{count} {name}" for name, count in requests.items())
    total = sum(requests.values())
    tokens = total * args.tokens
    say(f"draft: {total} requests, one at a time: {listed}")
    say(f"draft: at most {tokens:,} tokens written, {tokens / TOKENS_PER_S / 60:.0f} min at {TOKENS_PER_S:.0f} tok/s")


def measure(args: argparse.Namespace, target: Target) -> int:
    k = acceptance.depth(target)
    acceptance.wait_until_idle(target)
    given = acceptance.offline(target.facts["artifact"], k, args.offline)
    prompts = {name: prompts_of(name, args, target)[:count] for name, count in counts(args).items()}
    sampling = Sampling(args.tokens, args.temperature, args.seed, args.thinking)
    opened = benching.begin(args, target, settings(args, k), vars(sampling), hashes(prompts))
    total = sum(map(len, prompts.values()))
    with steps("draft", total) as progress:
        done = 0

        def one(workload: str) -> Mapping[str, Any]:
            def step(finished: int) -> None:
                progress(done + finished, f"{workload} {finished}/{len(prompts[workload])}")

            part = answered(opened, target, workload, prompts[workload], sampling, args.request_timeout, step)
            return part | {"offline": acceptance.beside(part, given) if given else None}

        def finished(number: int, _doing: str) -> None:
            nonlocal done
            done = sum(map(len, list(prompts.values())[:number]))
            progress(done, "")

        measurement.measured(opened, list(prompts), one, finished)
    show(opened, k, given is not None)
    return benching.conclude(opened)


def prompts_of(workload: str, args: argparse.Namespace, target: Target) -> list[Prompt]:
    if workload != RANDOM:
        return workloads.written(workload)
    artifact = target.facts["artifact"]
    folder = Path(artifact["folder"] if artifact else args.artifact)
    return workloads.drawn(args.random_prompts, args.random_tokens, workloads.vocabulary(folder), args.seed)


def settings(args: argparse.Namespace, k: int) -> dict[str, Any]:
    """What decides the figures, besides prompts and sampling."""
    shape = {"prompts": args.random_prompts, "tokens": args.random_tokens, "ignore_eos": True}
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
    acceptance.wait_until_idle(target)
    for number in range(len(kept.answers), len(prompts)):
        step(number)
        try:
            kept.add(acceptance.count(target, prompts[number], number, sampling, limit_s))
        except UserError as error:
            there = f"{number} of {len(prompts)} prompts are kept, and the same command goes on"
            raise UserError(error.fact, f"{error.hint}; {there}") from None
    part = acceptance.figures(workload, kept.answers)
    return part | {"answers": kept.path.name, "answers_sha256": sha256_of(kept.path)}


def show(opened: Measurement, k: int, offline: bool) -> None:
    """The table, what the offline figures are, and how the same tokens are judged by our forward."""
    parts = {name: opened.part(name) for name in WORKLOADS}
    there = {name: part for name, part in parts.items() if part is not None}
    if not there:
        return
    console = Console(highlight=False)
    console.print(table(there, k, comparable(opened.content)))
    target = opened.content["target"]
    folder = (target["artifact"] or {}).get("folder") or "DIR"
    verify = f"python -m scripts.verify --artifact {shlex.quote(folder)} --source DIR"
    if offline:
        first = next(iter(there.values()))["offline"]
        say(f"offline: verify --deep, {first['tokens']:,} tokens, {first['source']}")
        say(f"they may differ: {acceptance.WHY}")
    else:
        say(f"no offline figures of this artifact for k={k}: {verify} --deep 8192")
    name = next(iter(there.values()))["answers"]
    say(f"the same tokens, judged place by place: {verify} --tokens {shlex.quote(str(opened.path.with_name(name)))}")


def comparable(content: Mapping[str, Any]) -> bool:
    """Whether the published figures are of the same model, on hardware of the same kind."""
    artifact = content["target"]["artifact"] or {}
    return bool(content["machine"]["gpus"]) and all(artifact.get(name) == size for name, size in FLASH.items())


def table(parts: Mapping[str, Mapping[str, Any]], k: int, beside_published: bool) -> Table:
    """A column a workload, and one for the offline figures: shares in percent, below each its 95% interval."""
    offline = next((part["offline"] for part in parts.values() if part["offline"]), None)
    caption = "95% intervals over prompts" if beside_published else f"95% intervals over prompts; {NOT_FLASH}"
    drawn = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, collapse_padding=True)
    drawn.add_column("", no_wrap=True)
    for name in (*parts, "offline") if offline else parts:
        drawn.add_column(name, justify="right", no_wrap=True)

    def row(heading: str, cell: Callable[[Mapping[str, Any]], str], last: str = "") -> None:
        drawn.add_row(heading, *map(cell, parts.values()), *([last] if offline else []))

    row("prompts", lambda part: f"{part['prompts']}", f"{offline['sequences']}" if offline else "")
    row("tokens", lambda part: f"{part['tokens']:,}", f"{offline['tokens']:,}" if offline else "")
    row("drafts", lambda part: f"{part['drafts']:,}")
    row("accepted", lambda part: percent(part["acceptance"]), percent(offline["acceptance"]) if offline else "")
    if offline:
        row("against offline", lambda part: points(part["offline"]["difference"]["acceptance"]))
    if beside_published:
        originals = {name: published.by_key()[f"draft/{name}"].original for name in parts}
        shown = [f"{each.value:.1f}%" if each else "-" for each in originals.values()]
        drawn.add_row("published, k=1", *shown, *([""] if offline else []))
    for at in range(k):
        same = percent(offline["given_earlier"][0]) if offline and not at else ""
        row(f"token {at + 1}", lambda part, at=at: percent(part["by_position"][at]), same)  # type: ignore[misc]
    for at in range(1, k):
        known = percent(offline["given_earlier"][at]) if offline else ""
        heading = f"token {at + 1}, if {at}"
        row(heading, lambda part, at=at: percent(part["given_earlier"][at]), known)  # type: ignore[misc]
    return drawn


def percent(told: Mapping[str, float | None]) -> str:
    """A share, and below it the ends of its interval."""
    if (value := told["value"]) is None:
        return "-"
    low, high = told["low"], told["high"]
    return f"{value:.1%}" if low is None or high is None else f"{value:.1%}\n[dim]{100 * low:.1f}..{100 * high:.1f}[/]"


def points(told: Mapping[str, float | None]) -> str:
    """A difference of shares in percentage points, and below it the ends of its interval."""
    if (value := told["value"]) is None:
        return "-"
    low, high = told["low"], told["high"]
    ends = "" if low is None or high is None else f"\n[dim]{100 * low:+.0f}..{100 * high:+.0f}[/]"
    return f"{100 * value:+.1f}{ends}"
