"""Calibration samples, on the embedded model's own tokenizer and texts."""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from v4forge import pins
from v4forge.errors import UserError
from v4forge.model import chat_format, corpus, corpus_rows

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
VOCAB_SIZE = 1024
BOS, EOS = 0, 1
TEXT = json.dumps({"text": "one two three"})
CHAT = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]


def load(
    path: Path | None = TINY / "calibration.jsonl", samples: int = 8, seq_len: int = 64, seed: int = 42
) -> corpus.Corpus:
    return corpus.load(TINY, path, samples, seq_len, seed, VOCAB_SIZE)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_samples_are_full_rows_of_the_vocabularys_tokens() -> None:
    tokens = load().tokens
    assert tokens.shape == (8, 64) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < VOCAB_SIZE
    assert not (tokens == 2).any(), "padding"


def test_the_embedded_corpus_fills_the_default_samples_of_tiny() -> None:
    assert load(samples=64, seq_len=256).tokens.shape == (64, 256)


def test_the_same_settings_give_the_same_samples() -> None:
    first, second = load(), load()
    assert torch.equal(first.tokens, second.tokens)
    assert (first.sha256, first.description) == (second.sha256, second.description)


@pytest.mark.parametrize("change", [{"seed": 43}, {"samples": 4}, {"seq_len": 128}])
def test_another_setting_gives_another_hash(change: dict[str, int]) -> None:
    assert load(**change).sha256 != load().sha256  # type: ignore[arg-type]


def test_a_shorter_run_reads_the_beginning_of_a_longer_one() -> None:
    assert torch.equal(load(samples=4).tokens, load(samples=8).tokens[:4])


def test_a_description_names_the_file_and_not_its_folder(tmp_path: Path) -> None:
    path = written(tmp_path, "mine.jsonl", TEXT)
    described = load(path, samples=1, seq_len=4).description
    assert "mine.jsonl" in described and str(tmp_path) not in described


def test_the_documents_that_were_used_are_told_by_number_in_their_order(tmp_path: Path) -> None:
    words = ["apple", "river", "stone", "cloud", "table", "green"]
    path = written(tmp_path, "c.jsonl", "".join(json.dumps({"text": f"{word} " * 9}) + "\n" for word in words))
    made = load(path, samples=2, seq_len=16)
    text = corpus.load_tokenizer(TINY).decode(made.tokens.flatten().tolist())
    used = [words[number] for number in made.documents]
    assert [text.count(word) > 0 for word in words] == [word in used for word in words]
    assert used == sorted(used, key=text.index) and 1 < len(used) < len(words)
    assert made.origin["documents"] == len(words)
    assert made.origin["file_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_document_stands_between_bos_and_eos(tmp_path: Path) -> None:
    documents = ["a b c", "d e f", "g h i"]
    path = written(tmp_path, "c.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in documents))
    tokenizer = corpus.load_tokenizer(TINY)
    expected = sorted([BOS, *tokenizer.encode(text).ids, EOS] for text in documents)
    stream = load(path, samples=1, seq_len=sum(map(len, expected))).tokens[0].tolist()
    starts = [i for i, token in enumerate(stream) if token == BOS] + [len(stream)]
    assert sorted(stream[a:b] for a, b in pairwise(starts)) == expected


def test_a_conversation_is_read_as_its_chat_prompt(tmp_path: Path) -> None:
    path = written(tmp_path, "c.jsonl", json.dumps({"messages": CHAT}))
    expected = corpus.load_tokenizer(TINY).encode(chat_format.encode_messages(CHAT)).ids
    assert expected[0] == BOS and expected[-1] == EOS
    assert load(path, samples=1, seq_len=len(expected)).tokens[0].tolist() == expected


def test_reasoning_and_tools_reach_the_prompt() -> None:
    thought = [CHAT[0], {**CHAT[1], "reasoning": "Add them."}]
    tool = {"type": "function", "function": {"name": "add"}}
    prompt = corpus_rows.document_of({"messages": thought, "tools": [tool]})
    assert "<think>Add them.</think>4" in prompt and '{"name": "add"}' in prompt


def test_a_text_file_is_one_document_or_several_between_form_feeds(tmp_path: Path) -> None:
    assert corpus_rows.read_documents(written(tmp_path, "a.txt", "one\n\ntwo\n")) == ["one\n\ntwo\n"]
    assert corpus_rows.read_documents(written(tmp_path, "b.txt", "one\n\f\ntwo\n")) == ["one\n", "two\n"]


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives_the_jsonl_form(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    assert corpus_rows.read_documents(written(tmp_path_factory.mktemp("c"), "c.jsonl", lines)) == documents


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="<>｜"), min_size=1))
def test_the_embedded_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer = corpus.load_tokenizer(TINY)
    (ids,) = corpus.encode_documents(tokenizer, [text])
    assert tokenizer.decode(ids[1:-1], skip_special_tokens=False) == text


def test_the_embedded_tokenizer_has_v4s_markers_as_single_tokens() -> None:
    tokenizer = corpus.load_tokenizer(TINY)
    markers = (
        chat_format.BOS,
        chat_format.EOS,
        chat_format.PAD,
        chat_format.USER,
        chat_format.ASSISTANT,
        chat_format.THINK,
        chat_format.END_THINK,
        chat_format.DSML,
    )
    assert [len(tokenizer.encode(marker).ids) for marker in markers] == [1] * len(markers)
    assert [tokenizer.token_to_id(marker) for marker in markers[:3]] == [0, 1, 2]
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCAB_SIZE))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("", "an empty line"),
        ("3", "neither a text nor messages"),
        ('{"prompt": "x"}', "neither a text nor messages"),
        ('{"text": "x", "messages": []}', "both a text and messages"),
        ('{"text": " "}', "empty"),
        ('{"text": 3}', "not a string"),
        ('{"messages": "Hi"}', "not a list"),
        ('{"messages": []}', "without messages"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "the role 'robot'"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": {"name": "f"}}', "`tools` is not a list"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, what: str) -> None:
    path = written(tmp_path, "c.jsonl", f"{TEXT}\n{line}\n{TEXT}\n")
    with pytest.raises(UserError) as caught:
        load(path, samples=1, seq_len=4)
    assert caught.value.fact.startswith(f"{path}:2: ") and what in caught.value.fact and caught.value.hint


@pytest.mark.parametrize(("name", "text"), [("c.jsonl", ""), ("c.txt", ""), ("c.txt", "\n\f\n")])
def test_a_file_without_documents_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(UserError, match="no document"):
        load(written(tmp_path, name, text))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither \.jsonl nor \.txt"):
        load(written(tmp_path, "c.csv", "x"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "nothing.jsonl")


def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 3"):
        load(path)


def test_a_corpus_that_is_too_small_says_what_would_fit(tmp_path: Path) -> None:
    path = written(tmp_path, "c.jsonl", json.dumps({"text": "0 1 2 3 4 5 6 7 8 9"}))
    (ids,) = corpus.encode_documents(corpus.load_tokenizer(TINY), corpus_rows.read_documents(path))
    with pytest.raises(UserError) as caught:
        load(path, samples=100, seq_len=8)
    assert f"{len(ids)} tokens" in caught.value.fact and f"--samples {len(ids) // 8}" in caught.value.hint
    assert load(path, samples=len(ids) // 8, seq_len=8).tokens.shape == (len(ids) // 8, 8)
    with pytest.raises(UserError, match=f"--seq-len {len(ids)} "):
        load(path, samples=1, seq_len=1000)


def test_a_tokenizer_of_a_larger_vocabulary_than_the_models_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary ends at 99"):
        corpus.load(TINY, TINY / "calibration.jsonl", 8, 64, 42, vocab_size=100)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        corpus.load(tmp_path, TINY / "calibration.jsonl", 1, 1, 0, VOCAB_SIZE)
    written(tmp_path, "tokenizer.json", "{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        corpus.load(tmp_path, TINY / "calibration.jsonl", 1, 1, 0, VOCAB_SIZE)


def test_without_a_file_the_pinned_split_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(repo: str, **kwargs: Any) -> list[dict[str, Any]]:
        asked.update(repo=repo, **kwargs)
        return [{"prompt": "x", "messages": CHAT}] * 5

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    read = load(None, samples=2, seq_len=16)
    repo, revision, split = (pins.read()[f"CORPUS_{key}"] for key in ("REPO", "REVISION", "SPLIT"))
    assert asked == {"repo": repo, "revision": revision, "split": split}
    assert revision in read.description and read.tokens.shape == (2, 16)


def test_an_unreachable_data_set_leads_to_a_local_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nand a long story")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError) as caught:
        load(None)
    assert caught.value.fact.endswith("no route to host") and "--corpus" in caught.value.hint
