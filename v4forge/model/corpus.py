"""Calibration samples: documents from a local file or the pinned data set, packed into rows of token ids.

A document is a text or a conversation in V4's chat format. Documents are put into an order that follows from the seed
alone, each is wrapped in BOS and EOS, and the stream that they make is cut into samples of equal length: no padding,
so that every token that a Hessian counts is a token of a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from v4forge import pins
from v4forge.errors import UserError
from v4forge.model import chat_format

if TYPE_CHECKING:
    import torch

DOCUMENT_BREAK = "\f\n"  # between the documents of a .txt file

_LINE_HINT = 'write {"text": "..."} or {"messages": [{"role": "user", "content": "..."}]}, one object a line'


@dataclass(frozen=True)
class Corpus:
    """tokens: [samples, seq_len] int64. sha256: of ids and settings. description: for people.

    origin: what it was taken from, by content: {"file_sha256"} of a local file; "repo", "revision" and "split" of a
    data set; and "documents", how many there were. documents: which of them, from 0, in the order of the samples.
    """

    tokens: torch.Tensor
    sha256: str
    seed: int
    description: str
    origin: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[int, ...] = ()


def load(tokenizer_dir: Path, corpus: Path | None, samples: int, seq_len: int, seed: int, vocab_size: int) -> Corpus:
    """`samples` rows of exactly `seq_len` tokens from `corpus`, or from the pinned data set if it is None.

    A .jsonl file holds `{"text": …}` or `{"messages": […]}` (and optionally `tools`) a line; a .txt file is one
    document, or several with a form feed on the line between them. The same file, settings and tokenizer give the
    same rows anywhere.

    Raises UserError for an unreadable file or line, tokens outside the vocabulary, or a corpus that is too small.
    """
    if samples < 1 or seq_len < 1:
        raise UserError(f"{samples} samples of {seq_len} tokens", "ask for at least one sample of one token")
    tokenizer = load_tokenizer(tokenizer_dir)
    found = _pinned() if corpus is None else _local(corpus)

    wanted = samples * seq_len
    stream: list[int] = []
    used: list[int] = []
    for index in sorted(range(found.count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest()):
        if len(stream) >= wanted:
            break
        (ids,) = encode_documents(tokenizer, [found.document(index)])
        stream += ids
        used.append(index)
    if len(stream) < wanted:
        rows = len(stream) // seq_len
        fits = f"--samples {rows}" if rows else f"--seq-len {len(stream)} --samples 1"
        raise UserError(
            f"{found.name} holds {len(stream):,} tokens, and {samples} samples of {seq_len} need {wanted:,}",
            f"pass {fits} or a larger --corpus",
        )
    check_vocabulary(max(stream), vocab_size, tokenizer_dir)
    import torch  # here, because what only asks for a text's origin has no use for it

    tokens = torch.tensor(stream[:wanted], dtype=torch.int64).reshape(samples, seq_len)
    settings = {"samples": samples, "seq_len": seq_len, "seed": seed, "vocab_size": vocab_size}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokens.numpy().astype("<i8").tobytes())
    packed = f"packed from {len(used):,} of {found.count:,} documents of {found.name}"
    description = f"{samples} x {seq_len} tokens, {packed}, seed {seed}"
    origin = {**found.origin, "documents": found.count}
    return Corpus(tokens, digest.hexdigest(), seed, description, origin, tuple(used))


def check_vocabulary(largest: int, vocab_size: int, tokenizer_dir: Path) -> None:
    """Raises UserError when the largest token id of a text is one that the model does not know."""
    if largest >= vocab_size:
        raise UserError(
            f"{tokenizer_dir / 'tokenizer.json'} gives token {largest}, the vocabulary ends at {vocab_size - 1}",
            "use the tokenizer and the config.json of one checkpoint",
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; raises UserError if it has none, or one without V4's BOS and EOS."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing", "copy tokenizer.json from the upstream checkpoint into that folder")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(
            f"{path} is no tokenizer: {error}", "fetch the file again from the upstream checkpoint"
        ) from error
    for token in (chat_format.BOS, chat_format.EOS):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{path} has no token {token}", "use the tokenizer of a DeepSeek-V4 checkpoint")
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    """The token ids of each document, between BOS and EOS; a chat prompt that has them gets no second ones."""
    bos, eos = tokenizer.token_to_id(chat_format.BOS), tokenizer.token_to_id(chat_format.EOS)
    assert bos is not None and eos is not None, "load_tokenizer checks this"
    encoded = []
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        ids = list(encoding.ids)
        encoded.append([bos] * (ids[:1] != [bos]) + ids + [eos] * (ids[-1:] != [eos]))
    return encoded


def read_documents(path: Path) -> list[str]:
    """The documents of a .jsonl or .txt file in file order; raises UserError, for a bad line with `file:line`."""
    if not path.is_file():
        raise UserError(f"the corpus {path} does not exist", "pass --corpus a .jsonl or .txt file")
    if path.suffix not in (".jsonl", ".txt"):
        raise UserError(f"the corpus {path} is neither .jsonl nor .txt", "convert it to one of the two and name it so")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}", "convert the file to UTF-8") from error
    if path.suffix == ".txt":
        documents = [document for document in text.split(DOCUMENT_BREAK) if document.strip()]
    else:
        # Not splitlines(): it also breaks at characters that JSON allows inside a string.
        documents = list(_documents_of_lines(path, text.removesuffix("\n").split("\n") if text else []))
    if not documents:
        raise UserError(f"{path} holds no document", "pass --corpus a file with text in it")
    return documents


def document_of(line: Any) -> str:
    """The text or chat prompt of one corpus object; reasoning is shown if it has any. Raises UserError."""
    if not isinstance(line, dict) or not ("text" in line or "messages" in line):
        raise UserError("neither a text nor messages", _LINE_HINT)
    if "text" in line and "messages" in line:
        raise UserError("both a text and messages", _LINE_HINT)
    if "messages" in line:
        messages = line["messages"]
        if not isinstance(messages, list):
            raise UserError("`messages` is not a list", _LINE_HINT)
        if not isinstance(line.get("tools", []), list):
            raise UserError("`tools` is not a list", 'write "tools": [{"type": "function", "function": {...}}]')
        return chat_format.encode_messages(
            messages, thinking=chat_format.has_reasoning(messages), tools=line.get("tools")
        )
    if not isinstance(line["text"], str) or not line["text"].strip():
        raise UserError("`text` is empty or not a string", _LINE_HINT)
    return line["text"]


def _documents_of_lines(path: Path, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield document_of(json.loads(line))
        except json.JSONDecodeError as error:
            what = f"not JSON ({error})" if line.strip() else "an empty line"
            raise UserError(f"{path}:{number}: {what}", _LINE_HINT) from error
        except UserError as error:
            raise UserError(f"{path}:{number}: {error.fact}", error.hint) from error


@dataclass(frozen=True)
class _Source:
    """How many documents, the one at an index, and what they are from: a data set is too large to encode before the
    choice."""

    count: int
    document: Callable[[int], str]
    name: str
    origin: Mapping[str, Any]


def pinned_origin() -> dict[str, str]:
    """The data set that is calibrated on where no file is named, as versions.env has it."""
    return {name: pins.read()[f"CORPUS_{name.upper()}"] for name in ("repo", "revision", "split")}


def file_origin(path: Path) -> dict[str, str]:
    """A local corpus, by its content."""
    return {"file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _local(path: Path) -> _Source:
    documents = read_documents(path)
    origin = file_origin(path)
    return _Source(len(documents), documents.__getitem__, f"{path.name} (sha256 {origin['file_sha256']})", origin)


def _pinned() -> _Source:
    origin = pinned_origin()
    repo, revision, split = (origin[key] for key in ("repo", "revision", "split"))
    name = f"{repo}@{revision} ({split})"
    try:
        import datasets

        from v4forge import http_clients

        http_clients.serve_hub()
        rows = datasets.load_dataset(repo, revision=revision, split=split)
    except UserError:
        raise
    except Exception as error:  # no package, no network, no such revision: many libraries' errors, one remedy
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"the data set {name} cannot be loaded: {reason}",
            "pass --corpus FILE (.jsonl or .txt) to calibrate on a local file",
        ) from error

    def document(index: int) -> str:
        try:
            return document_of({"messages": rows[index].get("messages")})
        except UserError as error:
            raise UserError(f"{name}, row {index}: {error.fact}", error.hint) from error

    return _Source(len(rows), document, name, origin)
