"""Small data sets in the form of the published ones, with sentences of our own: local copies for bench quality."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUBJECTS = ("astronomy", "high_school_biology", "sociology")
CATEGORIES = ("computer science", "history")
FRUIT = ("plums", "pears", "figs", "limes", "nuts")


def write(folder: Path) -> Path:
    """Every task's files below `folder`."""
    lines(folder / "gsm8k/train.jsonl", (sum_of(n) for n in range(2, 12)))
    lines(folder / "gsm8k/test.jsonl", (sum_of(n) for n in range(12, 18)))
    for subject in SUBJECTS:
        lines(folder / f"mmlu/{subject}/dev.jsonl", (choice(subject, n) for n in range(5)))
        lines(folder / f"mmlu/{subject}/test.jsonl", (choice(subject, n) for n in range(5, 9)))
    for split, numbers in {"validation": range(5), "test": range(5, 8)}.items():
        rows = (ten_choices(category, n) for category in CATEGORIES for n in numbers)
        lines(folder / f"mmlu_pro/{split}.jsonl", rows)
    lines(folder / "humaneval_instruct/test.jsonl", (function(n) for n in range(4)))
    lines(folder / "aime24/train.jsonl", (problem(n) for n in range(3)))
    return folder


def lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sum_of(n: int) -> dict[str, Any]:
    fruit = FRUIT[n % len(FRUIT)]
    question = f"Mara has {n} {fruit} in a bowl and buys {n + 3} more. How many {fruit} are hers?"
    return {"question": question, "answer": f"{n} + {n + 3} = <<{n}+{n + 3}={2 * n + 3}>>{2 * n + 3}\n#### {2 * n + 3}"}


def choice(subject: str, n: int) -> dict[str, Any]:
    choices = [f"after {n + k} steps" for k in range(4)]
    question = f"In this made-up exercise of {subject}, when does the bell ring that rings after {n + n % 4} steps?"
    return {"question": question, "subject": subject, "choices": choices, "answer": n % 4}


def ten_choices(category: str, n: int) -> dict[str, Any]:
    return {
        "question_id": n,
        "question": f"A drawer of {category} is numbered {n}. Which number is on it?",
        "options": [str(n + k) for k in range(10)],
        "answer": "A",
        "answer_index": 0,
        "cot_content": f"A: Let's think step by step. The drawer has the number {n}. The answer is (A).",
        "category": category,
        "src": "made up",
    }


def function(n: int) -> dict[str, Any]:
    return {
        "task_id": f"Own/{n}",
        "prompt": f'def add_{n}(x: int) -> int:\n    """Returns x and {n} together."""\n',
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n    assert candidate(-{n}) == 0\n",
        "entry_point": f"add_{n}",
    }


def problem(n: int) -> dict[str, Any]:
    return {
        "ID": f"own-{n}",
        "Problem": f"Find the remainder of ${10 * n + 7}$ divided by $5$.",
        "Solution": "The tens are multiples of $5$, and $7 = 5 + 2$.",
        "Answer": 2,
    }
