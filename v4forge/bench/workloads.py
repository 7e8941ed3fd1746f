"""The prompts of the benches: code to go on with, chats, openings of prose, and random tokens, as ids or as a text.

data/prompts/<workload>.jsonl, written for this project: {"id", "kind", "text"} a line, or {"id", "kind", "messages"}.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from v4forge.errors import UserError

FOLDER = Path(__file__).parent / "data" / "prompts"
RANDOM = "random"
WRITTEN = ("code", "chat", "prose")
WORKLOADS = (RANDOM, *WRITTEN)
TITLES = {"random": "random tokens", "code": "code", "chat": "chat", "prose": "raw prose"}  # for people
# As the published figure had them: 256 tokens in, 256 out.
PROMPT_TOKENS = 256
ANSWER_TOKENS = 256
RANDOM_PROMPTS = 60
# A draw of tokens that cannot be written as a text of as many tokens is repaired so often, then drawn anew.
REPAIRS, DRAWS = 100, 20


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


def drawn(ids: Sequence[int], seed: int) -> list[Prompt]:
    """RANDOM_PROMPTS prompts of PROMPT_TOKENS of these ids, each equally likely. The answer goes on over the end of the
    text, because behind noise it may come at once."""
    draw = random.Random(seed)
    return [
        Prompt(
            f"{RANDOM}/{number}",
            RANDOM,
            "/v1/completions",
            {"prompt": draw.choices(ids, k=PROMPT_TOKENS), "ignore_eos": True},
        )
        for number in range(RANDOM_PROMPTS)
    ]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and the tokens that prompts are drawn from: all but the special ones and those that are no whole
    characters."""

    tokenizer: Tokenizer
    drawable: Sequence[int]


def vocabulary(folder: Path) -> Vocabulary:
    """The tokens of the tokenizer in a folder. Raises UserError where there is none."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises Exception itself
        hint = "name the folder of what is served: --artifact <folder>"
        raise UserError(f"{path} is no tokenizer, which prompts are made with: {error}", hint) from None
    special = set(tokenizer.get_added_tokens_decoder())
    every = range(tokenizer.get_vocab_size(with_added_tokens=True))
    texts = zip(every, tokenizer.decode_batch([[number] for number in every]), strict=True)
    return Vocabulary(
        tokenizer, [each for each, text in texts if text and "\ufffd" not in text and each not in special]
    )


def random_prompts(words: Vocabulary, tokens: int, count: int, seed: str) -> list[str]:
    """`count` different texts of drawn tokens that a server reads as exactly `tokens`, with those that it puts before.

    Raises UserError where there are no such texts.
    """
    length = tokens - words.tokenizer.num_special_tokens_to_add(False)
    source = random.Random(seed)
    found: dict[str, None] = {}
    for _ in range(DRAWS * count if words.drawable and length > 0 else 0):
        text = _text_of(words, length, source)
        if text is not None:
            found[text] = None
        if len(found) == count:
            return list(found)
    fact = f"{count} different prompts of exactly {tokens} tokens cannot be made with this tokenizer"
    raise UserError(fact, "ask for longer prompts: --shapes 256x256")


def _text_of(words: Vocabulary, length: int, source: random.Random) -> str | None:
    """A text of `length` tokens. Drawn tokens that stand beside each other may be read as fewer: it is filled up until
    it is read as long as it should be. None when that does not come about."""
    ids = source.choices(words.drawable, k=length)
    for _ in range(REPAIRS):
        text = str(words.tokenizer.decode(ids, skip_special_tokens=False))
        read = words.tokenizer.encode(text, add_special_tokens=False).ids
        if len(read) == length:
            return text
        ids = read[:length] + source.choices(words.drawable, k=max(0, length - len(read)))
    return None
