"""Token sequences that checkpoints are measured on: held-out text, or a file of token ids, a server's output say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4forge.errors import UserError
from v4forge.model.corpus import check_vocabulary, encode_documents, load_tokenizer
from v4forge.model.corpus_rows import read_documents

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST = 5  # tokens: three drafts are judged on it
KEYS = (("tokens",), ("prompt_token_ids", "token_ids"), ("token_ids",))  # of a line's object, whose lists are joined
FORMS = '[1, 2, …], {"tokens": […]} or vLLM\'s {"prompt_token_ids": […], "token_ids": […]} a line'


def tokens(
    tokenizer_dir: Path, heldout: Path, sequences: int, seq_len: int, vocab_size: int, bad_text: str = "refuse"
) -> Tensor:
    """The first tokens of the held-out documents, one after another: [sequences, seq_len] int64.

    Raises UserError when there are fewer, or one that the model does not know.
    """
    if not heldout.is_file():
        raise UserError(f"the held-out text {heldout} does not exist", "pass --heldout a .txt or .jsonl file")
    encoded = encode_documents(load_tokenizer(tokenizer_dir), read_documents(heldout, bad_text))
    stream = _as_tensor([token for document in encoded for token in document])
    wanted = sequences * seq_len
    if len(stream) < wanted:
        rows = len(stream) // seq_len
        fits = f"--deep {rows * seq_len}" if rows else f"--deep {len(stream)} --seq-len {len(stream)}"
        raise UserError(
            f"{heldout} holds {len(stream):,} tokens, and {sequences} sequences of {seq_len} need {wanted:,}",
            f"pass {fits}, or a longer --heldout",
        )
    check_vocabulary(int(stream[:wanted].max()), vocab_size, tokenizer_dir)
    return stream[:wanted].view(sequences, seq_len)


def read_tokens(path: Path, vocab_size: int) -> list[Tensor]:
    """The sequences of a .jsonl file in one of FORMS, [n] int64 each; lines of white space do not count.

    Raises UserError, naming file and line, for anything else, a token that the model does not know, and fewer than
    SHORTEST tokens.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path} cannot be read: {reason}", f"pass a .jsonl file: {FORMS}") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"{path} holds no tokens", f"write {FORMS}")
    return [_as_tensor(_sequence(f"{path}:{number}", line, vocab_size)) for number, line in numbered]


def prompt_lengths(path: Path) -> list[int]:
    """How many tokens of each sequence that read_tokens finds in the file were a prompt, by its prompt_token_ids; 0
    where a line does not tell."""
    lines = path.read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines if line.strip()]
    return [len(each.get("prompt_token_ids", ())) if isinstance(each, dict) else 0 for each in found]


def _as_tensor(ids: list[int]) -> Tensor:
    import torch  # not for who only asks which forms there are

    return torch.tensor(ids, dtype=torch.int64)


def _sequence(where: str, line: str, vocab_size: int) -> list[int]:
    try:
        found = _ids(json.loads(line))
    except (ValueError, RecursionError):
        found = None
    if found is None:
        raise UserError(f"{where}: no token ids", f"write {FORMS}")
    if unknown := [i for i in found if not 0 <= i < vocab_size]:
        raise UserError(
            f"{where}: token {unknown[0]}, and the vocabulary ends at {vocab_size - 1}", "pass tokens of this model"
        )
    if len(found) < SHORTEST:
        raise UserError(f"{where}: {len(found)} tokens", f"three drafts need {SHORTEST}; leave shorter sequences out")
    return found


def _ids(value: Any) -> list[int] | None:
    """The ids of a line in one of FORMS, None for anything else: for true and 1.0 too, which Python takes for 1."""
    if isinstance(value, dict):
        keys = next((keys for keys in KEYS if all(key in value for key in keys)), ("",))
        parts: list[Any] = [value.get(key) for key in keys]
        value = [i for part in parts for i in part] if all(isinstance(part, list) for part in parts) else None
    return value if isinstance(value, list) and all(type(i) is int for i in value) else None
