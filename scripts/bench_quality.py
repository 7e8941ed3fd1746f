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
import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scripts import benching, serve
from scripts.cli import steps
from v4forge import pins
from v4forge.bench import lm_eval, lm_eval_tasks, quality, results, sandbox
from v4forge.bench.lm_eval import Asked, Environment, Limits
from v4forge.bench.quality import Output, Task
from v4forge.bench.results import Measurement
from v4forge.bench.served_model import Target, sha256_of
from v4forge.bench.statistics import proportion
from v4forge.errors import UserError
from v4forge.files import exclusive, make_folder, write_json
from v4forge.images import containers, definitions
from v4forge.serving import client

WORK = "quality-work"  # below the reports: derived tasks, data, answers so far
LOG = "lm-eval.log"
PROBE_LIMIT_S = 300.0
REVISION = "pin it in versions.env, or use local copies: --datasets DIR"
Progress = Callable[[str], None]


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


@dataclass(frozen=True)
class Prepared:
    """Where lm-eval is, its version, and what is derived of each task: the names of its parts, those without data."""

    environment: Environment
    lm_eval: str
    found: Mapping[str, Mapping[str, list[str]]]

    @property
    def tasks(self) -> Path:
        return self.environment.work / "tasks"


def run(args: argparse.Namespace) -> int:
    benching.check(args)
    tasks = quality.choose(args.tasks)
    if args.concurrency < 2:
        raise UserError("lm-eval tells how far it is with two requests at a time or more", "--concurrency 2")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens} leaves no answer", "--max-tokens 256, or leave it out")
    if args.dry_run:
        show(args, tasks)
        return 0
    data = {task.name: data_of(task, args.datasets) for task in tasks}
    make_folder(args.reports / WORK)
    with alone(args.reports / WORK):
        prepared = prepare(args, tasks, data)
        with benching.served(args) as at:
            return measure(args, at, tasks, data, prepared)


def show(args: argparse.Namespace, tasks: list[Task]) -> None:
    """Says what would be asked."""
    seconds = 0.0
    for task in tasks:
        asked = task.asked(args.limit)
        where = "local copies" if args.datasets else f"at {revision_of(task) or 'no pinned commit'}"
        tokens = "for log-probabilities" if task.scores_prompts else f"of up to {most_tokens(args, task)} tokens each"
        serve.say(f"{task.name}: {task.why}")
        serve.say(f"    {asked} questions, {task.fewshot}-shot: {asked * task.requests} requests {tokens}")
        serve.say(f"    {args.concurrency} at a time through /v1/{'chat/' * (task.api == 'chat')}completions")
        serve.say(f"    data: {task.dataset}, {where}")
        seconds += task.published.get("seconds", 0) * asked / task.questions
    about = f", about {max(1, round(seconds / 60))} min on two H200s, as published" if seconds else ""
    serve.say(f"quality: {sum(task.asked(args.limit) for task in tasks)} questions in {len(tasks)} tasks{about}")


def most_tokens(args: argparse.Namespace, task: Task) -> int:
    return min(task.max_tokens, args.max_tokens or task.max_tokens)


def revision_of(task: Task) -> str:
    """The pinned commit of a task's data set; "" where there is none."""
    return pins.read().get(task.revision, "")


def data_of(task: Task, datasets: Path | None) -> dict[str, Any]:
    """Which data a task is run on: path, name, and revision, or the sha256 of each local file.

    Raises UserError where the revision is not pinned, or there is no local file of a split.
    """
    about = {"path": task.dataset, "name": task.folders or task.config or None}
    if datasets is None:
        if not (revision := revision_of(task)):
            raise UserError(f"the revision of {task.dataset} is not known: {task.revision}", REVISION)
        return about | {"revision": revision}
    folder = (datasets / task.lm_eval).absolute()
    pattern = "*/" if task.folders else ""
    files = {split: sorted(folder.glob(f"{pattern}{split}.jsonl")) for split in task.splits}
    for split, found in files.items():
        if not found:
            missing = folder / f"{'<' + task.folders + '>/' if task.folders else ''}{split}.jsonl"
            raise UserError(f"there is no {missing}", f"copy {task.dataset} there, or leave it out: --tasks …")
    hashes = {str(path.relative_to(folder)): sha256_of(path) for found in files.values() for path in found}
    return about | {"sha256": hashes}


def alone(folder: Path) -> AbstractContextManager[int]:
    """Keeps a second run out of the folder: both would write the same answers."""
    busy = UserError(f"another run works in {folder}", "wait for it, or use another --reports")
    return exclusive(folder / "lock", lambda: busy)


def prepare(args: argparse.Namespace, tasks: list[Task], data: Mapping[str, Mapping[str, Any]]) -> Prepared:
    """Finds lm-eval, and derives its tasks with their data. Raises UserError where a whole run would lack parts."""
    environment = environment_of(args)
    program, spec = environment.work / "derive.py", environment.work / "spec.json"
    shutil.copyfile(lm_eval_tasks.__file__, program)
    specs = {task.name: spec_of(args, task, data[task.name]) for task in tasks}
    write_json(spec, {"folder": str(environment.work / "tasks"), "tasks": specs})
    log = environment.work / "derive.log"
    log.unlink(missing_ok=True)
    words = [environment.python, str(program), str(spec)]
    said = lm_eval.run(environment, words, {}, log, Limits(PROBE_LIMIT_S, PROBE_LIMIT_S))
    try:
        found = json.loads(said.strip().splitlines()[-1])
        prepared = Prepared(environment, found["lm_eval"], found["tasks"])
    except (ValueError, KeyError, IndexError):
        raise UserError(f"the tasks could not be derived: {lm_eval.last_line(said)}", f"more is in {log}") from None
    for task in tasks:
        names, missing = (prepared.found[task.name][key] for key in ("names", "missing"))
        if not names or (missing and args.limit is None):
            parts = f"{len(missing)} of {len(names) + len(missing)} parts, {missing[0]} first"
            raise UserError(f"there are no data for {task.name}: {parts}", "copy all, or try some: --limit 10")
    return prepared


def environment_of(args: argparse.Namespace) -> Environment:
    """Where lm-eval runs: the serving image, or the folder of programs that serves without docker."""
    work = (args.reports / WORK).absolute()
    if folder := benching.programs(args):
        return Environment(work, folder)
    reads = [args.datasets.absolute()] if args.datasets else []
    return Environment(work, engine=containers.connect(), image=definitions.resolve("serve"), reads=reads)


def tokenizer_of(args: argparse.Namespace, at: Target) -> Path | None:
    """The folder with the model's tokenizer: the one given, or the artifact's as far as the target tells."""
    artifact = at.facts.get("artifact") or {}
    folder: str = args.tokenizer or artifact.get("folder") or ""
    if args.tokenizer and not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"there is no tokenizer.json in {folder}", "--tokenizer <the artifact's folder>")
    return Path(folder).absolute() if folder else None


def spec_of(args: argparse.Namespace, task: Task, data: Mapping[str, Any]) -> dict[str, Any]:
    """What derive.py is told of a task."""
    return {
        "lm_eval": task.lm_eval,
        "source": task.source,
        "group": task.is_group,
        "code": task.runs_code,
        "splits": list(task.splits),
        "folders": task.folders,
        "local": str((args.datasets / task.lm_eval).absolute()) if args.datasets else "",
        "revision": data.get("revision", ""),
        "max_tokens": most_tokens(args, task),
    }


def measure(
    args: argparse.Namespace, at: Target, tasks: list[Task], data: Mapping[str, dict[str, Any]], prepared: Prepared
) -> int:
    """Runs the tasks one by one -> the exit code."""
    table = quality.table()
    tokenizer = tokenizer_of(args, at)
    if tokenizer:
        environment = prepared.environment
        prepared = replace(prepared, environment=replace(environment, reads=[*environment.reads, tokenizer]))
    settings = {
        "tasks": {task.name: settings_of(args, task, prepared) for task in tasks},
        "concurrency": args.concurrency,
        "runtime": "host" if prepared.environment.program else "docker",
    }
    sampling = {"temperature": 0, "do_sample": False, "fewshot_seed": table.fewshot_seed}
    hashes = {"quality.toml": sha256_of(quality.TABLE)}
    for name, about in data.items():
        settings["tasks"][name]["dataset"] = {key: value for key, value in about.items() if key != "sha256"}
        hashes |= {f"{name}/{file}": digest for file, digest in about.get("sha256", {}).items()}
    opened = benching.begin(args, at, settings, sampling, hashes, {"lm_eval": prepared.lm_eval})
    by_name = {task.name: task for task in tasks}
    with steps("quality", len(tasks), "tasks", resumes=True) as progress:

        def one(name: str) -> dict[str, Any]:
            number = list(by_name).index(name)
            bench = Bench(args, at, prepared, opened, lambda doing: progress(number, doing))
            return bench.part(by_name[name], data[name])

        results.measured(opened, list(by_name), one, progress)
    code = benching.conclude(opened)
    if code == 0:
        shutil.rmtree(prepared.environment.work / opened.path.stem, ignore_errors=True)
    return code


def settings_of(args: argparse.Namespace, task: Task, prepared: Prepared) -> dict[str, Any]:
    found = prepared.found[task.name]
    return {
        "lm_eval": task.lm_eval,
        "fewshot": task.fewshot,
        "api": task.api,
        "max_tokens": most_tokens(args, task),
        "missing": found["missing"],
    }


@dataclass(frozen=True)
class Bench:
    """What the parts of one measurement share."""

    args: argparse.Namespace
    at: Target
    prepared: Prepared
    opened: Measurement
    progress: Progress

    @property
    def kept(self) -> Path:
        """What is kept beside the report: samples, and lm-eval's own results."""
        return self.opened.path.with_suffix("")

    def part(self, task: Task, data: Mapping[str, Any]) -> dict[str, Any]:
        """Measures a task. Raises UserError when that fails; the answers that came are there for the next run."""
        begun = time.monotonic()
        image = self.args.sandbox_image or definitions.resolve("serve")
        engine = sandbox.connect(image) if task.runs_code else None
        asked = self.asked(task)
        client.ask(self.at.endpoint, "/v1/models")  # a server that is gone is told at once
        folder = self.prepared.environment.work / self.opened.path.stem / task.name
        shutil.rmtree(folder / "results", ignore_errors=True)  # of a run that was killed after lm-eval had ended
        make_folder(folder)
        make_folder(self.kept)
        words = lm_eval.command(self.prepared.environment.python, task, asked, self.prepared.tasks / task.name, folder)
        limits = Limits(asked.timeout_s)
        said = lm_eval.run(
            self.prepared.environment,
            words,
            self.variables(),
            folder / LOG,
            limits,
            lambda done, total: self.progress(f"{task.name} {done}/{total}"),
        )
        output = quality.read_output(folder / "results")
        described = quality.describe(task, output)
        scores = self.run_programs(task, engine, image, output) if engine else {}
        if not engine:
            quality.keep_samples(output.samples(), self.samples(task))
        write_json(self.kept / f"{task.name}.json", output.results)
        shutil.rmtree(folder)
        return {
            "task": task.name,
            "fewshot": task.fewshot,
            **described,
            "metrics": scores.get("metrics") or quality.metrics(task, output),
            "dataset": dict(data),
            "samples": str(self.samples(task).relative_to(self.opened.path.parent)),
            "lm_eval": self.prepared.lm_eval,
            "command": shlex.join(words),
            "max_tokens": asked.max_tokens,
            "differs": differs(task, asked, described, self.prepared.found[task.name]["missing"]),
            "answers_of_earlier_runs": lm_eval.cached(said),
            "elapsed_s": round(time.monotonic() - begun, 1),
            **{key: value for key, value in scores.items() if key != "metrics"},
        }

    def samples(self, task: Task) -> Path:
        return self.kept / f"{task.name}.samples.jsonl.gz"

    def asked(self, task: Task) -> Asked:
        """What is asked of the server. Raises UserError where it has no room for it, or the tokenizer is not known."""
        tokenizer = tokenizer_of(self.args, self.at)
        if task.scores_prompts and tokenizer is None:
            fact = f"{task.name} takes the model's tokenizer, and {self.at.url} does not say where it is"
            raise UserError(fact, "--tokenizer <the artifact's folder>")
        most, length = most_tokens(self.args, task), self.at.facts.get("max_model_len")
        needed = task.context or most + 1
        if isinstance(length, int) and length < needed:
            fact = f"{task.name} takes {needed} tokens of context, the server has {length}"
            raise UserError(fact, f"serve with --set max-model-len={2 * needed}, or try: --limit 5 --max-tokens 256")
        table = quality.table()
        return Asked(
            url=self.at.url,
            model=self.at.model,
            tokenizer=str(tokenizer or ""),
            seed=self.args.seed,
            fewshot_seed=table.fewshot_seed,
            concurrency=self.args.concurrency,
            attempts=table.attempts,
            timeout_s=self.args.request_timeout or task.timeout_s,
            max_tokens=most,
            limit=self.args.limit,
        )

    def variables(self) -> dict[str, str]:
        """lm-eval's environment: the key, where data sets are kept, and whether the hub may be asked."""
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if self.args.datasets else {}
        return {
            "OPENAI_API_KEY": self.at.key,
            "HF_HOME": str(self.prepared.environment.work / "huggingface"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "LMEVAL_LOG_LEVEL": "INFO",
            "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **offline,
        }

    def run_programs(self, task: Task, engine: containers.Engine, image: str, output: Output) -> dict[str, Any]:
        """Runs the programs of a task's answers, and keeps each with its verdict."""
        samples = list(output.samples())
        cut = self.prepared.found[task.name]["cut"]
        programs = [quality.program(sample, cut) for sample in samples]
        verdicts = sandbox.score(
            engine, image, programs, lambda done: self.progress(f"{task.name}: {done}/{len(programs)} programs run")
        )
        judged = ({**s, "program": p, **asdict(v)} for s, p, v in zip(samples, programs, verdicts, strict=True))
        quality.keep_samples(judged, self.samples(task))
        outcomes = [verdict.outcome for verdict in verdicts]
        return {
            "metrics": {"pass@1": proportion(outcomes.count("passed"), len(outcomes))},
            "outcomes": {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))},
            "sandbox": {"image": image, "id": str(engine.client.images.get(image).id), "limit_s": sandbox.LIMIT_S},
        }


def differs(task: Task, asked: Asked, described: Mapping[str, Any], missing: list[str]) -> list[str]:
    """In what a part differs from the published task, besides model and server; for people."""
    found = []
    if asked.limit is not None:
        found.append(f"a trial of {described['questions']} of {task.questions} questions")
    elif described["questions"] != task.questions:
        found.append(f"{described['questions']} questions instead of {task.questions}")
    if missing:
        found.append(f"{len(missing)} of {task.parts} parts are missing")
    if asked.max_tokens < task.max_tokens:
        found.append(f"answers end after {asked.max_tokens} tokens instead of {task.max_tokens}")
    if task.published and described["task_versions"] != [task.published["version"]]:
        versions = ", ".join(described["task_versions"])
        found.append(f"version {versions} of lm-eval's task, published: {task.published['version']}")
    return found
