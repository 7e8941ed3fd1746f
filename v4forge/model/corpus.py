"""Calibration samples: documents from a local file or the pinned data set, packed into rows of token ids.

A document is a text or a conversation in V4's chat format. Documents are put into an order that follows from the seed
alone, each is wrapped in BOS and EOS, and the stream that they make is cut into samples of equal length: no padding,
so that every token that a Hessian counts is a token of a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from v4forge.errors import UserError
from v4forge.files import check_no_pointer
from v4forge.model import chat_format, hub_rows
from v4forge.model.corpus_rows import read_documents
from v4forge.model.hub_rows import DataSet

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Corpus:
    """tokens: [samples, seq_len] int64. sha256: of ids and settings. description: for people.

    origin: what it was taken from, by content: {"file_sha256"} of a local file; "repo", "revision" and "split" of a
    data set, of some "column" and "config"; "documents", how many there were; "bad_text" where it is "replace".
    documents: which of them, from 0, in the order of the samples.
    """

    tokens: torch.Tensor
    sha256: str
    seed: int
    description: str
    origin: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[int, ...] = ()


def load(
    tokenizer_dir: Path,
    corpus: Path | DataSet | None,
    samples: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    bad_text: str = "refuse",
) -> Corpus:
    """`samples` rows of exactly `seq_len` tokens from `corpus`, or from the pinned data set if it is None.

    A .jsonl file holds `{"text": …}`, `{"messages": […]}` or ShareGPT's `{"conversations": […]}` (and optionally
    `tools`) a line; a .txt file is one document, or several with a form feed on the line between them; either may be
    packed, .gz. bad_text: as for `corpus_rows.read_documents`. The same file, settings and tokenizer give the same rows
    anywhere.

    Raises UserError for an unreadable file or line, tokens outside the vocabulary, or a corpus that is too small.
    """
    if samples < 1 or seq_len < 1:
        raise UserError(f"{samples} samples of {seq_len} tokens", "ask for at least one sample of one token")
    tokenizer = load_tokenizer(tokenizer_dir)
    if isinstance(corpus, Path):
        found = _local(corpus, bad_text)
    else:
        found = _of_hub(corpus or hub_rows.pinned(), bad_text)

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
    origin = {**found.origin, "documents": found.count} | ({"bad_text": bad_text} if bad_text == "replace" else {})
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
        check_no_pointer(path)
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


@dataclass(frozen=True)
class _Source:
    """How many documents, the one at an index, and what they are from: a data set is too large to encode before the
    choice."""

    count: int
    document: Callable[[int], str]
    name: str
    origin: Mapping[str, Any]


def file_origin(path: Path) -> dict[str, str]:
    """A local corpus, by its content."""
    return {"file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _local(path: Path, bad_text: str) -> _Source:
    documents = read_documents(path, bad_text)
    origin = file_origin(path)
    return _Source(len(documents), documents.__getitem__, f"{path.name} (sha256 {origin['file_sha256']})", origin)


def _of_hub(source: DataSet, bad_text: str) -> _Source:
    count, document = hub_rows.rows(source, bad_text)
    return _Source(count, document, str(source), source.origin)
