"""lm-eval's tasks of the published table, asked of a served model: each with its standard error, data sets pinned.

python -m scripts.bench quality --artifact DIR
python -m scripts.bench quality --url http://127.0.0.1:8000 --tasks gsm8k mmlu --datasets DIR
python -m scripts.bench quality --dry-run

A task is measured whole or not at all; answers that came before an end are kept and not asked for again. --datasets
takes local copies, DIR/<task>/<split>.jsonl with the fields that the data set has on the hub; of mmlu
DIR/mmlu/<subject>/<split>.jsonl. Programs that the model writes are run in containers without network, or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from v4forge.bench import measure_quality, quality
from v4forge.bench.prepare_quality import Options, revision_of
from v4forge.bench.quality import Task
from v4forge.errors import UserError
from v4forge.serving.launch import say

from . import benching


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options that only this bench has."""
    add = command.add_argument
    known = ", ".join(quality.table().tasks)
    add("--tasks", nargs="+", default=[], metavar="TASK", help=f"some of {known}; default: the published table's")
    add("--datasets", type=Path, metavar="DIR", help="local copies of the data sets; the hub is not asked")
    add("--tokenizer", default="", metavar="DIR", help="folder of tokenizer.json, for mmlu; default: the artifact's")
    concurrency = quality.table().concurrency
    add("--concurrency", type=int, default=concurrency, metavar="N", help="requests at a time; default: %(default)s")
    add("--max-tokens", type=int, metavar="N", help="cut answers that the task lets be longer; for trials")
    add("--sandbox-image", default="", metavar="IMAGE", help="runs programs, has python3; default: the serving image")
    add("--request-timeout", type=float, metavar="S", help="for one answer; default: the task's, 300 to 3600")


def run(args: argparse.Namespace) -> int:
    benching.check(args)
    tasks = quality.choose(args.tasks)
    if args.concurrency < 2:
        raise UserError("lm-eval tells how far it is with two requests at a time or more", "--concurrency 2")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens} leaves no answer", "--max-tokens 256, or leave it out")
    options = Options(
        concurrency=args.concurrency,
        datasets=args.datasets,
        tokenizer=args.tokenizer,
        max_tokens=args.max_tokens,
        sandbox_image=args.sandbox_image,
        answer_limit_s=args.request_timeout,
    )
    if args.dry_run:
        show(options, tasks, args.limit)
        return 0
    return measure_quality.run(benching.session_of(args), options, tasks)


def show(options: Options, tasks: Sequence[Task], limit: int | None) -> None:
    """Says what would be asked."""
    seconds = 0.0
    for task in tasks:
        asked = task.asked(limit)
        where = "local copies" if options.datasets else f"at {revision_of(task) or 'no pinned commit'}"
        tokens = "for log-probabilities" if task.scores_prompts else f"of up to {options.most_tokens(task)} tokens each"
        say(f"{task.name}: {task.why}")
        say(f"    {asked} questions, {task.fewshot}-shot: {asked * task.requests} requests {tokens}")
        say(f"    {options.concurrency} at a time through /v1/{'chat/' * (task.api == 'chat')}completions")
        say(f"    data: {task.dataset}, {where}")
        seconds += task.published.get("seconds", 0) * asked / task.questions
    about = f", about {max(1, round(seconds / 60))} min on two H200s, as published" if seconds else ""
    say(f"quality: {sum(task.asked(limit) for task in tasks)} questions in {len(tasks)} tasks{about}")
