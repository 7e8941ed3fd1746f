"""Answers to questions with known solutions: which tasks, and what lm-eval says of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from v4forge.errors import UserError
from v4forge.files import atomic_path

TABLE = Path(__file__).parent / "data/quality.toml"
INVALID = "[invalid]"  # what lm-eval's filters make of an answer in which they find nothing

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A row of data/quality.toml, which says what each field means."""

    name: str
    lm_eval: str
    source: str
    why: str
    fewshot: int
    api: str
    metrics: Mapping[str, str]
    questions: int
    dataset: str
    revision: str
    splits: Sequence[str]
    max_tokens: int
    timeout_s: float
    parts: int = 1
    requests: int = 1
    config: str = ""
    folders: str = ""
    context: int = 0
    extra: bool = False
    published: Mapping[str, Any] = field(default_factory=dict)

    @property
    def runs_code(self) -> bool:
        """Whether its answers are programs, which a container of ours runs."""
        return not self.metrics

    @property
    def scores_prompts(self) -> bool:
        """Whether nothing is generated: choices are weighed by their log-probabilities, which takes a tokenizer."""
        return self.context > 0

    @property
    def is_group(self) -> bool:
        return self.parts > 1

    def asked(self, limit: int | None) -> int:
        """Questions of a run, of `limit` a part if there is one."""
        return self.questions if limit is None else min(self.questions, limit * self.parts)


@dataclass(frozen=True)
class Table:
    """The tasks by name, in the order in which they run, and what holds for all of them."""

    tasks: Mapping[str, Task]
    fewshot_seed: int
    concurrency: int
    attempts: int


@lru_cache(maxsize=1)
def table() -> Table:
    """data/quality.toml."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    tasks = {name: Task(name=name, **row) for name, row in rows.items() if isinstance(row, dict)}
    return Table(tasks, **{name: value for name, value in rows.items() if not isinstance(value, dict)})


def choose(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, those of the published table without any. Raises UserError for an unknown one."""
    tasks = table().tasks
    if unknown := [name for name in names if name not in tasks]:
        raise UserError(f"there is no task {unknown[0]!r}", f"--tasks takes some of: {' '.join(tasks)}")
    return [task for task in tasks.values() if (task.name in names if names else not task.extra)]


def prompts_hash(hashes: Mapping[str, str]) -> str:
    """lm-eval's hash of a task's data, prompts and targets; over those of its parts, by name, where it has several."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in sorted(hashes)).encode()).hexdigest()


@dataclass(frozen=True)
class Output:
    """What a run of lm-eval left in a folder: its results, and its samples by part."""

    results: dict[str, Any]
    files: Mapping[str, Path]

    def samples(self) -> Iterator[dict[str, Any]]:
        """Every answer, once for each filter, with the name of its part as `task`."""
        for name, path in self.files.items():
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    yield {"task": name, **json.loads(line)}


def read_output(folder: Path) -> Output:
    """The newest results in a folder of lm-eval's. Raises UserError where there are none, or not whole."""
    hint = "the same again; lm-eval.log beside the results says more"
    found = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not found:
        raise UserError(f"lm-eval ended without results in {folder}", hint)
    stamp = found[-1].stem.removeprefix("results_")
    try:
        results = json.loads(found[-1].read_text(encoding="utf-8"))
        names = sorted(results["n-samples"])
    except (ValueError, KeyError, OSError):
        raise UserError(f"{found[-1]} is not whole", hint) from None
    files = {name: found[-1].with_name(f"samples_{name}_{stamp}.jsonl") for name in names}
    if missing := [path for path in files.values() if not path.is_file()]:
        raise UserError(f"lm-eval wrote no samples: {missing[0].name} is missing", hint)
    return Output(results, files)


def metrics(task: Task, output: Output) -> dict[str, dict[str, float | None]]:
    """Our metrics by name, as shares with their standard errors. Raises UserError for one that lm-eval did not give."""
    found = {}
    for name, theirs in task.metrics.items():
        metric, _, picked = theirs.partition(",")
        row = output.results["results"].get(task.lm_eval, {})
        value, se = row.get(theirs), row.get(f"{metric}_stderr,{picked}")
        if not isinstance(value, float | int):
            raise UserError(f"lm-eval gives no {theirs} for {task.lm_eval}", "is its version that of versions.env?")
        found[name] = {"value": float(value), "se": float(se) if isinstance(se, float | int) else None}
    return found


def describe(task: Task, output: Output) -> dict[str, Any]:
    """What is to be known of a run besides its metrics: prompts, versions, parts, answers that nothing can be read in.

    invalid: questions whose answer is empty, or in which no filter found anything; empty: those of the former kind;
    unread: by filter, questions in whose answer it found nothing.
    """
    results = output.results
    hashes = {name: str(results["task_hashes"].get(name)) for name in output.files}
    versions = sorted({str(results["versions"].get(name)) for name in output.files})
    read: dict[tuple[str, Any], bool] = {}
    empty: set[tuple[str, Any]] = set()
    unread: dict[str, int] = {}
    for sample in output.samples():
        question = (sample["task"], sample["doc_id"])
        nothing = is_empty(sample)
        if nothing:
            empty.add(question)
        failed = first(sample["filtered_resps"]) == INVALID
        if failed:
            unread[sample["filter"]] = unread.get(sample["filter"], 0) + 1
        read[question] = read.get(question, False) or not (failed or nothing)
    found = prompts_hash(hashes)
    return {
        "questions": sum(each["effective"] for each in results["n-samples"].values()),
        "task_hash": found,
        "as_published": found == task.published["hash"] if task.published else None,
        "task_versions": versions,
        "parts": {name: _part(results, name) for name in output.files} if task.is_group else {},
        "invalid": sum(not each for each in read.values()),
        "empty": len(empty),
        "unread": unread,
    }


def _part(results: Json, name: str) -> dict[str, Any]:
    row = results["results"].get(name, {})
    values = {key.split(",")[0]: value for key, value in row.items() if "," in key}
    return {"questions": results["n-samples"][name]["effective"], **values}


def is_empty(sample: Json) -> bool:
    """Whether the model's answer has no text; log-probabilities always say something."""
    answer = first(sample["resps"])
    return isinstance(answer, str) and not answer.strip()


def first(answers: Any) -> Any:
    """The answer within lm-eval's lists of lists: of questions asked once, the only one."""
    while isinstance(answers, list) and answers:
        answers = answers[0]
    return answers


def program(sample: Json, cut: Sequence[str] = ()) -> str:
    """The program of an answer, with its tests: up to the end of the answer's code block, as lm-eval cuts it, and up to
    the first of the strings `cut`, which the server was not told to stop at."""
    written: str = first(sample["resps"]) or ""
    for end in ("```", *cut):
        written = written.partition(end)[0]
    return f"{sample['doc']['prompt']}{written}\n{sample['target']}"


def keep_samples(samples: Iterator[dict[str, Any]], path: Path) -> None:
    """Writes samples as compressed JSON lines: prompts with the same examples in each are large."""
    with atomic_path(path) as temporary, gzip.open(temporary, "wt", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
