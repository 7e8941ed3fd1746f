"""v4forge.model.heldout: files of token ids, as people and servers write them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from v4forge.errors import UserError
from v4forge.model import heldout

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
VOCABULARY = 50
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=heldout.SHORTEST)
WRITTEN = {
    "list": lambda ids: ids,
    "tokens": lambda ids: {"tokens": ids, "text": "…"},
    "token_ids": lambda ids: {"token_ids": ids, "finish_reason": "stop"},
    "vLLM": lambda ids: {"token_ids": ids[3:], "prompt_token_ids": ids[:3]},
}


@given(sequences=st.lists(st.tuples(IDS, st.sampled_from(sorted(WRITTEN))), min_size=1, max_size=5))
def test_every_form_gives_back_its_tokens(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[tuple[list[int], str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "tokens.jsonl"
    path.write_text("\n \n".join(json.dumps(WRITTEN[form](ids)) for ids, form in sequences) + "\n")
    found = heldout.read_tokens(path, VOCABULARY)
    assert [each.tolist() for each in found] == [ids for ids, _ in sequences]
    assert all(each.dtype == torch.int64 for each in found)
    assert heldout.prompt_lengths(path) == [3 if form == "vLLM" else 0 for _, form in sequences]


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("hello", "no token ids"),
        ("[" * 100_000, "no token ids"),
        ("[1, 2, 3.0, 4, 5]", "no token ids"),
        ("[1, 2, true, 4, 5]", "no token ids"),
        ('{"text": "hello"}', "no token ids"),
        ('{"prompt_token_ids": [1, 2, 3, 4, 5]}', "no token ids"),
        ('{"prompt_token_ids": null, "token_ids": [1, 2, 3, 4, 5]}', "no token ids"),
        ('{"tokens": "12345"}', "no token ids"),
        ("[1, 2, 3, 50, 5]", "token 50, and the vocabulary ends at 49"),
        ("[1, 2, 3, -1, 5]", "token -1, and the vocabulary ends at 49"),
        ("[1, 2, 3, 4]", "4 tokens"),
    ],
)
def test_what_is_no_sequence_is_refused_with_its_line(tmp_path: Path, line: str, fact: str) -> None:
    path = tmp_path / "tokens.jsonl"
    path.write_text(f"[1, 2, 3, 4, 5]\n\n{line}\n")
    with pytest.raises(UserError, match=f"tokens.jsonl:3: {fact}") as raised:
        heldout.read_tokens(path, VOCABULARY)
    assert raised.value.hint


def test_held_out_tokens_are_the_first_of_the_packed_documents() -> None:
    few = heldout.tokens(TINY, TINY / "heldout.txt", 2, 64, 1024)
    many = heldout.tokens(TINY, TINY / "heldout.txt", 1, 256, 1024)
    assert few.shape == (2, 64)
    assert few.flatten().tolist() == many.flatten().tolist()[:128]


@pytest.mark.parametrize(
    ("file", "sequences", "vocab_size", "fact"),
    [
        ("missing.txt", 1, 1024, "missing.txt does not exist"),
        ("heldout.txt", 10**6, 1024, "holds .* tokens, and 1000000 sequences of 64 need 64,000,000"),
        ("heldout.txt", 1, 4, "the vocabulary ends at 3"),
    ],
)
def test_held_out_text_that_cannot_be_used_is_refused(file: str, sequences: int, vocab_size: int, fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        heldout.tokens(TINY, TINY / file, sequences, 64, vocab_size)


def test_a_text_that_is_too_short_names_what_fits() -> None:
    with pytest.raises(UserError) as raised:
        heldout.tokens(TINY, TINY / "heldout.txt", 10**6, 64, 1024)
    fits = re.search(r"--deep (\d+)", raised.value.hint)
    assert fits and len(heldout.tokens(TINY, TINY / "heldout.txt", int(fits[1]) // 64, 64, 1024))


@pytest.mark.parametrize(("content", "fact"), [(b"", "holds no tokens"), (b"\xff\xfe", "not UTF-8"), (None, "No such")])
def test_a_file_without_tokens_is_refused(tmp_path: Path, content: bytes | None, fact: str) -> None:
    path = tmp_path / "tokens.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=fact):
        heldout.read_tokens(path, VOCABULARY)
