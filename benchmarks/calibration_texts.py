"""Calibration texts for benchmarks/calibration_settings.py: pools of documents by kind, drawn in equal parts, and what
is held out of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lab import TINY
from v4forge.checkout import ROOT
from v4forge.model import corpus, corpus_rows

PROMPTS = ROOT / "v4forge/bench/data/prompts"
FIELDS = ("text", "messages", "tools")
# "texts" are documentation and code of the Python standard library, what models/tiny was trained on, as are "chats" and
# "tool calls"; "prompts" of the benches are other English and other code.
KINDS = ("texts", "chats", "tool calls", "chat prompts", "code prompts", "prose prompts")
MIXES: Mapping[str, tuple[str, ...]] = {
    "texts alone": ("texts",),
    "chats alone": ("chats",),
    "texts and chats": ("texts", "chats"),
    "texts, chats and tool calls": ("texts", "chats", "tool calls"),
    "the benches' prompts: chat, code, prose": ("chat prompts", "code prompts", "prose prompts"),
    "all six kinds": KINDS,
}


@cache
def documents() -> dict[str, list[tuple[int, ...]]]:
    """The token ids of every document, by kind."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for line in _lines(Path(TINY.corpus)):
        kind = "texts" if "text" in line else "tool calls" if "tools" in line else "chats"
        found[kind].append(corpus_rows.document_of(line))
    for name in ("chat", "code", "prose"):
        for line in _lines(PROMPTS / f"{name}.jsonl"):
            found[f"{name} prompts"].append(corpus_rows.document_of({k: line[k] for k in FIELDS if k in line}))
    tokenizer = corpus.load_tokenizer(Path(TINY.source))
    return {kind: [tuple(ids) for ids in corpus.encode_documents(tokenizer, each)] for kind, each in found.items()}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def calibration(kind: str) -> list[tuple[int, ...]]:
    """Its documents for calibration: of texts all, whose held-out ones are heldout.txt; of the others every second."""
    return documents()[kind] if kind == "texts" else documents()[kind][::2]


def held_back(kind: str, seq_len: int) -> Tensor:
    """The other documents, one after another, [sequences, seq_len] int64."""
    stream = [token for ids in documents()[kind][1::2] for token in ids]
    rows = len(stream) // seq_len
    return torch.tensor(stream[: rows * seq_len]).view(rows, seq_len)


def mixed(kinds: Sequence[str], samples: int, seq_len: int, seed: int) -> Tensor:
    """Samples of which each kind has an equal part, as far as its documents go; the rest is of the first kinds that
    have more. [samples, seq_len] int64."""
    pools = {kind: _stream(calibration(kind), seed) for kind in kinds}
    wanted = samples * seq_len
    share = -(-wanted // len(kinds))
    taken = {kind: pool[:share] for kind, pool in pools.items()}
    for kind, pool in pools.items():
        missing = wanted - sum(map(len, taken.values()))
        taken[kind] = pool[: len(taken[kind]) + max(0, missing)]
    stream = [token for part in taken.values() for token in part][:wanted]
    return torch.tensor(stream).view(samples, seq_len)


def as_now(samples: int, seq_len: int, seed: int) -> Tensor:
    """Samples of the whole calibration file in one order of its documents, as calibration takes them."""
    of_file = [ids for kind in KINDS[:3] for ids in calibration(kind)]
    return torch.tensor(_stream(of_file, seed)[: samples * seq_len]).view(samples, seq_len)


def _stream(of: Sequence[tuple[int, ...]], seed: int) -> list[int]:
    def place(number: int) -> bytes:
        return hashlib.sha256(f"{seed}:{number}".encode()).digest()

    return [token for number in sorted(range(len(of)), key=place) for token in of[number]]
