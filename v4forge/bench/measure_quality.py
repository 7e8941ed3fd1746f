"""Measures quality task by task: lm-eval asks a served model, and what it leaves becomes a part of the result file."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from v4forge.bench import lm_eval, quality, results, sandbox
from v4forge.bench.lm_eval import Asked, Limits
from v4forge.bench.prepare_quality import WORK, Options, Prepared, alone, data_of, prepare
from v4forge.bench.quality import Output, Task
from v4forge.bench.results import Measurement
from v4forge.bench.served_model import Target, sha256_of
from v4forge.bench.session import Session, conclude
from v4forge.bench.statistics import proportion
from v4forge.errors import UserError
from v4forge.files import make_folder, write_json
from v4forge.images import containers, definitions
from v4forge.serving import client

LOG = "lm-eval.log"
Progress = Callable[[str], None]


def run(session: Session, options: Options, tasks: Sequence[Task]) -> int:
    """Serves what is measured and runs the tasks one by one -> the exit code."""
    data = {task.name: data_of(task, options.datasets) for task in tasks}
    work = session.reports / WORK
    make_folder(work)
    with alone(work):
        prepared = prepare(session, options, tasks, data)
        with session.served() as at:
            return measure(session, options, at, tasks, data, prepared)


def tokenizer_of(options: Options, at: Target) -> Path | None:
    """The folder with the model's tokenizer: the one given, or the artifact's as far as the target tells."""
    artifact = at.facts.get("artifact") or {}
    folder: str = options.tokenizer or artifact.get("folder") or ""
    if options.tokenizer and not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"there is no tokenizer.json in {folder}", "--tokenizer <the artifact's folder>")
    return Path(folder).absolute() if folder else None


def measure(
    session: Session,
    options: Options,
    at: Target,
    tasks: Sequence[Task],
    data: Mapping[str, dict[str, Any]],
    prepared: Prepared,
) -> int:
    """Runs the tasks one by one -> the exit code."""
    table = quality.table()
    tokenizer = tokenizer_of(options, at)
    if tokenizer:
        environment = prepared.environment
        prepared = replace(prepared, environment=replace(environment, reads=[*environment.reads, tokenizer]))
    settings: dict[str, Any] = {
        "tasks": {task.name: settings_of(options, task, prepared) for task in tasks},
        "concurrency": options.concurrency,
        "runtime": "host" if prepared.environment.program else "docker",
    }
    sampling = {"temperature": 0, "do_sample": False, "fewshot_seed": table.fewshot_seed}
    hashes = {"quality.toml": sha256_of(quality.TABLE)}
    for name, about in data.items():
        settings["tasks"][name]["dataset"] = {key: value for key, value in about.items() if key != "sha256"}
        hashes |= {f"{name}/{file}": digest for file, digest in about.get("sha256", {}).items()}
    opened = session.begin(at, settings, sampling, hashes, {"lm_eval": prepared.lm_eval})
    by_name = {task.name: task for task in tasks}
    with session.steps("quality", len(tasks), "tasks", resumes=True) as progress:

        def one(name: str) -> dict[str, Any]:
            number = list(by_name).index(name)
            bench = Bench(session, options, at, prepared, opened, lambda doing: progress(number, doing))
            return bench.part(by_name[name], data[name])

        results.measured(opened, list(by_name), one, progress)
    code = conclude(opened)
    if code == 0:
        shutil.rmtree(prepared.environment.work / opened.path.stem, ignore_errors=True)
    return code


def settings_of(options: Options, task: Task, prepared: Prepared) -> dict[str, Any]:
    found = prepared.found[task.name]
    return {
        "lm_eval": task.lm_eval,
        "fewshot": task.fewshot,
        "api": task.api,
        "max_tokens": options.most_tokens(task),
        "missing": found["missing"],
    }


@dataclass(frozen=True)
class Bench:
    """What the parts of one measurement share."""

    session: Session
    options: Options
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
        image = self.options.sandbox_image or definitions.resolve("serve")
        engine = sandbox.connect(image) if task.runs_code else None
        asked = self.asked(task)
        client.ask(self.at.endpoint, "/v1/models")  # a server that is gone is told at once
        folder = self.prepared.environment.work / self.opened.path.stem / task.name
        shutil.rmtree(folder / "results", ignore_errors=True)  # of a run that was killed after lm-eval had ended
        make_folder(folder)
        make_folder(self.kept)
        words = lm_eval.command(self.prepared.program, task, asked, self.prepared.tasks / task.name, folder)
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
        tokenizer = tokenizer_of(self.options, self.at)
        if task.scores_prompts and tokenizer is None:
            fact = f"{task.name} takes the model's tokenizer, and {self.at.url} does not say where it is"
            raise UserError(fact, "--tokenizer <the artifact's folder>")
        most, length = self.options.most_tokens(task), self.at.facts.get("max_model_len")
        needed = task.context or most + 1
        if isinstance(length, int) and length < needed:
            fact = f"{task.name} takes {needed} tokens of context, the server has {length}"
            raise UserError(fact, f"serve with --set max-model-len={2 * needed}, or try: --limit 5 --max-tokens 256")
        table = quality.table()
        return Asked(
            url=self.at.url,
            model=self.at.model,
            tokenizer=str(tokenizer or ""),
            seed=self.session.seed,
            fewshot_seed=table.fewshot_seed,
            concurrency=self.options.concurrency,
            attempts=table.attempts,
            timeout_s=self.options.answer_limit_s or task.timeout_s,
            max_tokens=most,
            limit=self.session.limit,
        )

    def variables(self) -> dict[str, str]:
        """lm-eval's environment: the key, where data sets are kept, and whether the hub may be asked."""
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if self.options.datasets else {}
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
