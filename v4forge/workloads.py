"""The prompts that drafts are counted on: code to go on with, chats, openings of prose, and random tokens.

data/prompts/<workload>.jsonl, written for this project: {"id", "kind", "text"} a line, or {"id", "kind", "messages"}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge.errors import UserError
from v4forge.files import read_json

FOLDER = Path(__file__).parent / "data" / "prompts"
RANDOM = "random"
WRITTEN = ("code", "chat", "prose")
WORKLOADS = (RANDOM, *WRITTEN)
# As the published figure had them: 256 tokens in, 256 out.
PROMPT_TOKENS = 256
ANSWER_TOKENS = 256
RANDOM_PROMPTS = 60


@dataclass(frozen=True)
class Prompt:
    """What is sent to `path`; `asked` is the body's part that holds the prompt, and what its workload adds to it."""

    id: str
    kind: str
    path: str
    asked: Mapping[str, Any]


def file_of(workload: str) -> Path:
    return FOLDER / f"{workload}.jsonl"


def written(workload: str, folder: Path = FOLDER) -> list[Prompt]:
    """The prompts of a data file, in its order. Raises UserError, naming the line, for another form."""
    path = folder / f"{workload}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", f"git checkout -- {path}") from None
    return [_prompt(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]


def _prompt(where: str, line: str) -> Prompt:
    try:
        row = json.loads(line)
        if messages := row.get("messages"):
            return Prompt(str(row["id"]), str(row["kind"]), "/v1/chat/completions", {"messages": messages})
        return Prompt(str(row["id"]), str(row["kind"]), "/v1/completions", {"prompt": row["text"]})
    except (ValueError, KeyError, AttributeError, RecursionError):
        form = '{"id": …, "kind": …, "text": …} or {"id": …, "kind": …, "messages": […]}'
        raise UserError(f"{where} is not a prompt", f"write {form}") from None


def drawn(count: int, tokens: int, vocabulary: Sequence[int], seed: int) -> list[Prompt]:
    """Prompts of so many tokens of the vocabulary, each equally likely. The answer goes on over the end of the text,
    because behind noise it may come at once. More of them begin with the same ones."""
    draw = random.Random(seed)
    return [
        Prompt(
            f"{RANDOM}/{number}",
            RANDOM,
            "/v1/completions",
            {"prompt": [draw.choice(vocabulary) for _ in range(tokens)], "ignore_eos": True},
        )
        for number in range(count)
    ]


def vocabulary(artifact: Path) -> list[int]:
    """The ids that stand for text: those of the tokenizer without the control tokens added to it, and without what only
    pads the embedding. Raises UserError where the folder has no tokenizer.json."""
    file = artifact / "tokenizer.json"
    told = read_json(file)
    try:
        added = {int(each["id"]) for each in told["added_tokens"]}
        ids = sorted({int(number) for number in told["model"]["vocab"].values()} - added)
    except (KeyError, TypeError, ValueError, AttributeError):
        ids = []
    if not ids:
        raise UserError(
            f"{file} does not tell the vocabulary, from which random prompts are drawn",
            "pass the folder of the artifact that is served, --artifact DIR, or --workloads code chat prose",
        )
    return ids
