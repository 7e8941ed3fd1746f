"""Tool calls in fifteen scenarios, 30 points, and ten short conversations, each with outcomes that a program checks.

python -m scripts.bench tools --artifact DIR
python -m scripts.bench tools --url http://127.0.0.1:8000 --limit 1
python -m scripts.bench tools --leave-out smoke recovery/busy-once

Scenarios: bench/data/tools/*.yaml, five categories of three, pass 2, partial 1, fail 0, as in ToolCall-15; the tools'
answers are in the files. Conversations: bench/data/smoke.yaml, four quick ones, four of writing, two of code; Python
is run in a container without network, a page is opened in headless Chromium. --limit N: of each category and group.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from v4forge.bench import results, sandbox
from v4forge.bench.results import Measurement
from v4forge.bench.served_model import Target, sha256_of
from v4forge.bench.session import Session, conclude
from v4forge.bench.tools import browser, chat_client, play, scenarios, smoke_prompts
from v4forge.bench.tools.answer_assertions import CHROMIUM, DOCKER
from v4forge.bench.tools.chat_client import Speaker
from v4forge.bench.tools.scenarios import Suite
from v4forge.bench.tools.smoke_prompts import Prompt
from v4forge.errors import UserError
from v4forge.images import definitions
from v4forge.serving.launch import say

from . import benching
from .cli import steps

TURN_TOKENS = 1024
THINKING_TOKENS = 8192  # more, where the model thinks before it answers
# Only for how long it may take.
ROUGH_TURNS, ROUGH_TOKENS, ROUGH_TOK_S = 3, 200, 88


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options that only this bench has."""
    add = command.add_argument
    add("--leave-out", nargs="+", default=[], metavar="KEY", help="scenarios or categories; smoke, or a group of it")
    add("--thinking", action="store_true", help="let the model think first; needs room: --set max-model-len=16384")
    add("--max-tokens", type=int, metavar="N", help=f"of an answer; default: {TURN_TOKENS}, of smoke 256 to 3072")
    add("--sandbox-image", default="", metavar="IMAGE", help="runs programs, has python3; default: the serving image")


@dataclass(frozen=True)
class Bench:
    """What is measured, of which target."""

    arguments: argparse.Namespace
    suite: Suite
    prompts: Mapping[str, Prompt]
    target: Target

    def speaker(self, max_tokens: int) -> Speaker:
        arguments = self.arguments
        most = tokens(arguments, max_tokens)
        return Speaker(
            self.target.endpoint, self.target.model, most, arguments.seed, arguments.request_timeout, arguments.thinking
        )

    def part(self, key: str) -> Mapping[str, Any]:
        """Measures one. Raises UserError when that cannot be done."""
        if key in self.prompts:
            prompt = self.prompts[key]
            checked_with = check_needs(self.arguments, prompt)
            speaker = self.speaker(prompt.max_tokens)
            found = smoke_prompts.part(
                prompt, lambda text: chat_client.reply(speaker, [{"role": "user", "content": text}]), self.programs
            )
            return {**found, "checked_with": checked_with}
        scenario = next(each for each in self.suite.scenarios if each.key == key)
        speaker = self.speaker(TURN_TOKENS)
        return play.part(self.suite, scenario, lambda messages, tools: chat_client.reply(speaker, messages, tools))

    def programs(self, programs: Sequence[str]) -> list[tuple[bool, str]]:
        """Runs Python programs, each in a container: whether it came to its end, and what it said if not."""
        image = image_of(self.arguments)
        verdicts = sandbox.score(sandbox.connect(image), image, programs)
        return [(each.passed, each.detail or each.outcome) for each in verdicts]


def tokens(arguments: argparse.Namespace, most: int) -> int:
    """Of an answer: what is asked for, else `most`, and more of them where the model thinks."""
    return arguments.max_tokens or most + THINKING_TOKENS * arguments.thinking


def image_of(arguments: argparse.Namespace) -> str:
    return arguments.sandbox_image or definitions.resolve("serve")


def check_needs(arguments: argparse.Namespace, prompt: Prompt) -> dict[str, str]:
    """What the answer is checked with besides this program: the image that runs it, the browser that opens it.

    Raises UserError where this machine has not got it; the model is then not asked.
    """
    found = {}
    try:
        if DOCKER in prompt.needs:
            image = image_of(arguments)
            found[DOCKER] = f"{image} {sandbox.connect(image).client.images.get(image).id}"
        if CHROMIUM in prompt.needs:
            found[CHROMIUM] = browser.version()
        return found
    except UserError as error:
        command = error.hint.split("; or ")[0].split(", or ")[0]
        raise UserError(error.fact, f"{command}; or without it: --leave-out {prompt.key}") from None


def run(arguments: argparse.Namespace) -> int:
    benching.check(arguments)
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise UserError(f"--max-tokens {arguments.max_tokens} leaves no answer", "--max-tokens 1024, or leave it out")
    suite = scenarios.load()
    prompts = {prompt.key: prompt for prompt in smoke_prompts.load()}
    everything = [*(scenario.key for scenario in suite.scenarios), *prompts]
    keys = scenarios.choose(everything, arguments.limit, arguments.leave_out)
    if arguments.dry_run:
        show(arguments, suite, prompts, keys)
        return 0
    session = benching.session_of(arguments)
    for key in keys:
        warn(arguments, prompts.get(key))
    with session.served() as at:
        bench = Bench(arguments, suite, prompts, at)
        opened = begin(session, bench, keys)
        try:
            with steps("tools", len(keys), "scenarios", resumes=True) as progress:
                results.measured(opened, keys, bench.part, progress)
        finally:
            summarize(opened, suite, prompts, keys)
    return conclude(opened)


def warn(arguments: argparse.Namespace, prompt: Prompt | None) -> None:
    """Says beforehand what will not be measured here."""
    try:
        if prompt:
            check_needs(arguments, prompt)
    except UserError as error:
        say(f"tools: {prompt.key if prompt else ''} will not be measured: {error.fact}\n  hint: {error.hint}")


def begin(session: Session, bench: Bench, keys: Sequence[str]) -> Measurement:
    arguments = bench.arguments
    settings = {
        "keys": list(keys),
        "left_out": sorted(arguments.leave_out),
        "max_turns": bench.suite.max_turns,
        "max_tokens": {
            "tools": tokens(arguments, TURN_TOKENS),
            **{prompt.group: tokens(arguments, prompt.max_tokens) for prompt in bench.prompts.values()},
        },
        "scoring": "pass 2, partial 1, fail 0; five categories of three scenarios",
    }
    sampling = {name: value for name, value in bench.speaker(TURN_TOKENS).sampling().items() if name != "max_tokens"}
    files = [*bench.suite.files, smoke_prompts.FILE]
    hashes = {str(path.relative_to(scenarios.FOLDER.parent)): sha256_of(path) for path in files}
    return session.begin(bench.target, settings, sampling, hashes)


def show(arguments: argparse.Namespace, suite: Suite, prompts: Mapping[str, Prompt], keys: Sequence[str]) -> None:
    """Says what would be asked."""
    abouts = {scenario.key: scenario.about for scenario in suite.scenarios}
    abouts |= {prompt.key: prompt.about for prompt in prompts.values()}
    width = max(map(len, keys))
    for key in keys:
        say(f"{key:<{width}}  {abouts[key]}")
    played = [key for key in keys if key not in prompts]
    most = len(played) * suite.max_turns + len(keys) - len(played)
    rough = len(played) * ROUGH_TURNS + len(keys) - len(played)
    say(
        f"tools: {len(played)} scenarios of {play.PASS} points, at most {suite.max_turns} turns of "
        f"{tokens(arguments, TURN_TOKENS)} tokens; {len(keys) - len(played)} conversations"
    )
    minutes = max(1, round(rough * ROUGH_TOKENS / ROUGH_TOK_S / 60))
    say(f"tools: about {rough} requests, at most {most}; about {minutes} min where a request gets {ROUGH_TOK_S} tok/s")


def summarize(opened: Measurement, suite: Suite, prompts: Mapping[str, Prompt], keys: Sequence[str]) -> None:
    """Prints what was measured: points by category, conversations by group, and why what was lost was lost."""
    parts = opened.content["parts"]
    table = Table(box=None)
    for place, column in enumerate(("", "measured", "points", "of")):
        table.add_column(column, justify="right" if place else "left")

    def measured_of(beginning: str) -> str:
        own = [key for key in keys if key.startswith(beginning)]
        return f"{sum(key in parts for key in own)}/{len(own)}"

    points = play.points(parts)
    for category in scenarios.CATEGORIES:
        got, most = points.get(category, (0, 0))
        if any(key.startswith(f"{category}/") for key in keys):
            table.add_row(category, measured_of(f"{category}/"), str(got) if most else "-", str(most))
    if points:
        got, most = (sum(column) for column in zip(*points.values(), strict=True))
        whole = most == play.MOST
        table.add_row("tool calls", "", str(got), f"{most}" if whole else f"{most} (all: {play.MOST})")
    for group, (ok, count) in smoke_prompts.counts(parts).items():
        table.add_row(f"smoke {group}", measured_of(f"{smoke_prompts.PREFIX}/{group}/"), str(ok), str(count))
    console = Console()
    console.print(table)
    for key in keys:
        for line in lost(parts.get(key, {})):
            console.print(f"  {key}: {line}", markup=False, highlight=False, soft_wrap=True)


def lost(part: Mapping[str, Any]) -> list[str]:
    """Why a part is not whole: the rules that a pass would have needed, the checks that failed."""
    if "score" in part:
        failed = [line.removeprefix("pass: fails: ") for line in part["why"] if line.startswith("pass: fails: ")]
        return [f"{part['score']} of {part['most']}: {line}" for line in failed]
    return [f"not ok: {each['name']}: {each['detail']}" for each in part.get("checks", ()) if not each["ok"]]
