"""What quality takes before a server is asked anything: lm-eval, and its tasks derived with their data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge import pins
from v4forge.bench import lm_eval, lm_eval_start, lm_eval_tasks
from v4forge.bench.lm_eval import Environment, Limits
from v4forge.bench.quality import Task
from v4forge.bench.served_model import sha256_of
from v4forge.bench.session import Session
from v4forge.errors import UserError
from v4forge.files import exclusive, write_json
from v4forge.images import containers, definitions

WORK = "quality-work"  # below the reports: derived tasks, data, answers so far
PROBE_LIMIT_S = 300.0
REVISION = "pin it in versions.env, or use local copies: --datasets DIR"


@dataclass(frozen=True)
class Options:
    """How the tasks are asked: `concurrency` at a time, answers of `max_tokens` where that is less than a task's, each
    within `answer_limit_s` or the task's own limit. `datasets`: the folder of local copies, with which the hub is not
    asked; `tokenizer`: the folder of the model's, "" for the artifact's; `sandbox_image`: "" for the serving image."""

    concurrency: int
    datasets: Path | None = None
    tokenizer: str = ""
    max_tokens: int | None = None
    sandbox_image: str = ""
    answer_limit_s: float | None = None

    def most_tokens(self, task: Task) -> int:
        """Of an answer."""
        return min(task.max_tokens, self.max_tokens or task.max_tokens)


@dataclass(frozen=True)
class Prepared:
    """Where lm-eval is, its version, and what is derived of each task: the names of its parts, those without data."""

    environment: Environment
    lm_eval: str
    found: Mapping[str, Mapping[str, list[str]]]

    @property
    def tasks(self) -> Path:
        return self.environment.work / "tasks"

    @property
    def program(self) -> list[str]:
        """What starts lm-eval."""
        return [self.environment.python, str(_start(self.environment))]


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


def prepare(
    session: Session, options: Options, tasks: Sequence[Task], data: Mapping[str, Mapping[str, Any]]
) -> Prepared:
    """Finds lm-eval, and derives its tasks with their data. Raises UserError where a whole run would lack parts."""
    environment = environment_of(session, options)
    program, spec = environment.work / "derive.py", environment.work / "spec.json"
    shutil.copyfile(lm_eval_tasks.__file__, program)
    shutil.copyfile(lm_eval_start.__file__, _start(environment))
    specs = {task.name: spec_of(options, task, data[task.name]) for task in tasks}
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
        if not names or (missing and session.limit is None):
            parts = f"{len(missing)} of {len(names) + len(missing)} parts, {missing[0]} first"
            raise UserError(f"there are no data for {task.name}: {parts}", "copy all, or try some: --limit 10")
    return prepared


def _start(environment: Environment) -> Path:
    return environment.work / "lm_eval_start.py"


def environment_of(session: Session, options: Options) -> Environment:
    """Where lm-eval runs: the serving image, or the folder of programs that serves without docker."""
    work = (session.reports / WORK).absolute()
    if folder := session.programs():
        return Environment(work, folder)
    reads = [options.datasets.absolute()] if options.datasets else []
    return Environment(work, engine=containers.connect(), image=definitions.resolve("serve"), reads=reads)


def spec_of(options: Options, task: Task, data: Mapping[str, Any]) -> dict[str, Any]:
    """What derive.py is told of a task."""
    return {
        "lm_eval": task.lm_eval,
        "source": task.source,
        "group": task.is_group,
        "code": task.runs_code,
        "splits": list(task.splits),
        "folders": task.folders,
        "local": str((options.datasets / task.lm_eval).absolute()) if options.datasets else "",
        "revision": data.get("revision", ""),
        "max_tokens": options.most_tokens(task),
    }
