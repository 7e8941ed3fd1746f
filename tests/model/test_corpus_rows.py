"""A corpus in every form that people and data sets write it in, and what is said of what is none."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import TINY

from v4forge.errors import UserError
from v4forge.files import is_pointer
from v4forge.model import corpus, hub_rows
from v4forge.model.corpus_rows import SPEAKERS, document_of, read_documents

ASKED = {"role": "user", "content": "What is 2 + 2?"}
CHAT = [ASKED, {"role": "assistant", "content": "4"}]
GPT = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
HALF = '{"text": "broken \\ud83d here"}'
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n"
COMMIT = "8" * 40
TOKENIZER = corpus.load_tokenizer(TINY)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def line(**row: Any) -> str:
    return json.dumps(row) + "\n"


FINE: dict[str, tuple[str, bytes]] = {
    "a mark of the byte order": ("c.jsonl", line(text="one").encode("utf-8-sig")),
    "a mark of the byte order in a text": ("c.txt", "one".encode("utf-8-sig")),
    "packed": ("c.jsonl.gz", gzip.compress(line(text="one").encode())),
    "a packed text": ("c.txt.gz", gzip.compress(b"one")),
    "in capitals": ("C.JSONL", line(text="one").encode()),
    "in capitals, packed": ("C.TXT.GZ", gzip.compress(b"one")),
    "empty lines at the end": ("c.jsonl", (line(text="one") + "\n \n\t\n\n").encode()),
    "lines of Windows": ("c.jsonl", b'{"text": "one"}\r\n\r\n'),
    "no end of the last line": ("c.jsonl", b'{"text": "one"}'),
    "other forms are null": ("c.jsonl", line(text="one", messages=None, conversations=None).encode()),
    "fields of others": ("c.jsonl", line(text="one", tools="hammer", system=3, id=[1]).encode()),
}


@pytest.mark.parametrize("what", FINE)
def test_a_corpus_is_read_however_it_is_packed(tmp_path: Path, what: str) -> None:
    assert read_documents(written(tmp_path, *FINE[what])) == ["one"]


def test_documents_of_a_windows_text_are_told_apart(tmp_path: Path) -> None:
    assert read_documents(written(tmp_path, "c.txt", b"one\r\n\f\r\ntwo\r\n")) == ["one\n", "two\n"]


@pytest.mark.parametrize("tools", [None, [], ""])
def test_no_tools_may_be_written_as_nothing(tools: Any) -> None:
    assert document_of({"messages": CHAT, "tools": tools}) == document_of({"messages": CHAT})
    asked = {**ASKED, "tools": tools, "tool_calls": tools, "reasoning": None, "tool_call_id": None}
    assert document_of({"messages": [asked, CHAT[1]]}) == document_of({"messages": CHAT})


def test_tools_may_be_json() -> None:
    assert document_of({"messages": CHAT, "tools": json.dumps([TOOL])}) == document_of(
        {"messages": CHAT, "tools": [TOOL]}
    )


@pytest.mark.parametrize("answer", [{}, {"content": None}, {"content": ""}])
def test_a_tool_may_answer_nothing(answer: dict[str, Any]) -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    read = document_of({"messages": [ASKED, called, {"role": "tool", "tool_call_id": "c1", **answer}, CHAT[1]]})
    assert "<tool_result></tool_result>" in read


def test_conversations_are_those_of_sharegpt() -> None:
    assert document_of({"conversations": GPT}) == document_of({"messages": CHAT})
    assert document_of({"conversations": CHAT}) == document_of({"messages": CHAT})
    system = {"role": "system", "content": "Be brief."}
    wanted = document_of({"messages": [system, *CHAT]})
    assert document_of({"conversations": GPT, "system": "Be brief."}) == wanted
    assert document_of({"conversations": [{"from": "system", "value": "Be brief."}, *GPT]}) == wanted


@pytest.mark.parametrize("speaker", [name for name in SPEAKERS if name != "function_call"])
def test_every_speaker_of_sharegpt_has_a_role(speaker: str) -> None:
    turns = [{"from": speaker.title(), "value": "hello"}, {"from": "gpt", "value": "4"}]
    wanted = [{"role": SPEAKERS[speaker], "content": "hello"}, {"role": "assistant", "content": "4"}]
    assert document_of({"conversations": turns}) == document_of({"messages": wanted})


def test_calls_and_answers_of_sharegpt_are_calls_and_answers() -> None:
    call = {"name": "add", "arguments": {"a": 2, "b": 2}}
    turns = [
        GPT[0],
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "4"},
        GPT[1],
    ]
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}
    wanted = [ASKED, called, {"role": "tool", "content": "4"}, CHAT[1]]
    assert document_of({"conversations": turns, "tools": [TOOL]}) == document_of({"messages": wanted, "tools": [TOOL]})


BAD: dict[str, tuple[str, str]] = {
    "half a character": (HALF, "half of a UTF-16 pair, '\\ud83d'"),
    "half a character in a chat": ('{"messages": [{"role": "user", "content": "\\udc00"}]}', "half of a UTF-16 pair"),
    "half a character in a name": (
        '{"messages": [{"role": "user", "content": "x", "\\udc00": 1}]}',
        "half of a UTF-16",
    ),
    "half a character in an argument": (
        line(
            messages=[
                ASKED,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]},
            ]
        ),
        "half of a UTF-16 pair",
    ),
    "too deep": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    "too many digits": ('{"text": ' + "9" * 5000 + "}", "not JSON"),
    "too deep for a schema": (line(messages=CHAT, tools=json.dumps(TOOL)), "`tools` is not a list"),
    "two objects": ('{"text": "a"}{"text": "b"}', "not JSON"),
    "an argument too deep": (
        line(
            messages=[
                ASKED,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 10**5}}]},
            ]
        ),
        "nested too deeply",
    ),
    "a call whose id is a list": (
        line(messages=[ASKED, {"role": "assistant", "tool_calls": [{**CALL, "id": [1]}]}]),
        "message 1: a tool call without a name",
    ),
    "an answer to a list": (
        line(messages=[ASKED, {"role": "tool", "tool_call_id": [1]}]),
        "tool_call_id is not a string",
    ),
    "calls that are a text": (line(messages=[ASKED, {"role": "assistant", "tool_calls": "f"}]), "a tool call without"),
    "tools that are texts": (line(messages=CHAT, tools=["f"]), "a declared tool has no `function`"),
    "a role that is a list": (line(messages=[{"role": ["user"], "content": "x"}]), "not an object with a role"),
    "a turn of nobody": (line(conversations=[{"value": "x"}]), "turn 0 does not say who speaks"),
    "a turn of a stranger": (line(conversations=[{"from": "cat", "value": "x"}]), "turn 0 is from 'cat'"),
    "a turn of a number": (line(conversations=[{"from": "gpt", "value": 3}]), "turn 0: its value is not a string"),
    "a call that is no JSON": (line(conversations=[GPT[0], {"from": "function_call", "value": "f()"}]), "not JSON"),
    "two conversations": (line(messages=CHAT, conversations=GPT), "both messages and conversations"),
    "nothing": (line(text=None), "neither a text nor messages"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_row_that_is_none_is_named_by_file_and_line(tmp_path: Path, what: str) -> None:
    row, fact = BAD[what]
    path = written(tmp_path, "c.jsonl", line(text="fine") + row.rstrip("\n") + "\n" + line(text="fine"))
    with pytest.raises(UserError) as caught:
        read_documents(path)
    assert caught.value.fact.startswith(f"{path}:2: ") and fact in caught.value.fact
    assert f"{caught.value.fact} {caught.value.hint}".isprintable()


def test_an_empty_line_between_others_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "c.jsonl", line(text="one") + "\n" + line(text="two"))
    with pytest.raises(UserError, match=r"c\.jsonl:2: an empty line"):
        read_documents(path)


def test_what_is_no_text_becomes_a_mark_when_that_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, "c.jsonl", HALF + '\n{"text": "whole \\ud83d\\ude00"}\n')
    assert read_documents(path, "replace") == ["broken \ufffd here", "whole \U0001f600"]
    made = corpus.load(TINY, path, 1, 8, 42, 1024, "replace")
    assert made.origin["bad_text"] == "replace"
    latin = written(tmp_path, "latin.txt", "one\ncaf\xe9".encode("latin-1"))
    assert read_documents(latin, "replace") == ["one\ncaf\ufffd"]
    with pytest.raises(UserError, match=r"latin\.txt:2: it is not UTF-8 at byte 7") as caught:
        read_documents(latin)
    assert "--bad-text replace" in caught.value.hint


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"one" * 1000, mtime=0)[:-9], b""])
def test_what_only_says_that_it_is_packed_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"c\.txt\.gz (is not gzip, or broke off|holds no document)"):
        read_documents(written(tmp_path, "c.txt.gz", content))


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt", "c.jsonl.gz"])
def test_a_pointer_in_a_corpus_place_is_called_that(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, POINTER)
    assert is_pointer(path)
    with pytest.raises(UserError, match="is a git-LFS pointer") as caught:
        read_documents(path)
    assert f"cd {tmp_path} && git lfs pull" in caught.value.hint


def test_a_pointer_in_the_tokenizers_place_is_called_that(tmp_path: Path) -> None:
    written(tmp_path, "tokenizer.json", POINTER)
    with pytest.raises(UserError, match=r"tokenizer\.json is a git-LFS pointer"):
        corpus.load_tokenizer(tmp_path)


def test_a_text_about_pointers_is_a_text(tmp_path: Path) -> None:
    path = written(tmp_path, "c.txt", POINTER + "and so on. " * 200)
    assert len(read_documents(path)) == 1


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A data set in the place of the hub's -> what it was asked for."""
    rows = [{"id": i, "story": f"story {i}", "chat": GPT, "tools": None, "prompt": "x"} for i in range(5)]
    table = datasets.Dataset.from_list(rows)
    asked: dict[str, Any] = {}

    def load_dataset(repo: str, *config: str, **given: Any) -> datasets.Dataset:
        asked.update(repo=repo, config=config, **given)
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(("column", "config"), [("story", ""), ("chat", "en")])
def test_any_data_set_of_the_hub_is_read_by_revision_split_and_column(
    hub: dict[str, Any], column: str, config: str
) -> None:
    named = f"hub:some/rows@{COMMIT},split=train[:50%],column={column}" + (f",config={config}" if config else "")
    source = hub_rows.named(named)
    assert isinstance(source, hub_rows.DataSet) and hub_rows.named(source.argument) == source
    made = corpus.load(TINY, source, 1, 16, 42, 1024)
    assert hub == {"repo": "some/rows", "config": (config,) * bool(config), "revision": COMMIT, "split": "train[:50%]"}
    origin = {"repo": "some/rows", "revision": COMMIT, "split": "train[:50%]", "column": column}
    assert made.origin == origin | ({"config": config} if config else {}) | {"documents": 5}
    text = corpus.load_tokenizer(TINY).decode(made.tokens[0].tolist(), skip_special_tokens=False)
    assert ("story" if column == "story" else "What is 2") in text


@pytest.mark.parametrize(
    ("column", "fact"), [("page", "has no such column"), ("id", r"row \d: `text` is empty or not")]
)
def test_a_column_that_holds_no_text_is_named(hub: dict[str, Any], column: str, fact: str) -> None:
    with pytest.raises(UserError, match=rf"some/rows@{COMMIT} \(train, {column}\)") as caught:
        corpus.load(TINY, hub_rows.parsed(f"hub:some/rows@{COMMIT},split=train,column={column}"), 1, 99, 0, 1024)
    assert re.search(fact, caught.value.fact)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("hub:some/rows", "names no data set"),
        ("hub:some/rows@main,split=train", "is not a commit"),
        (f"hub:some/rows@{COMMIT}", "names no split"),
        (f"hub:some/rows@{COMMIT},split=", "names no data set"),
        (f"hub:some/rows@{COMMIT},split=a,split=b", "names no data set"),
        (f"hub:some/rows@{COMMIT},split=a,columns=b", "names no data set"),
        (f"hub:../../etc@{COMMIT},split=a", "names no data set"),
        ("hub:", "names no data set"),
    ],
)
def test_a_data_set_that_is_not_named_whole_is_refused(text: str, fact: str) -> None:
    with pytest.raises(UserError, match=fact) as caught:
        hub_rows.named(text)
    assert caught.value.hint


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud83d", "", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "id": VALUES,
        "function": VALUES
        | st.fixed_dictionaries(
            {"name": VALUES, "arguments": VALUES | st.sampled_from(['{"a": 1}', "{", "[]", '{"\\ud83d": 1}'])}
        ),
    },
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | VALUES
MESSAGES = st.fixed_dictionaries(
    {"role": ROLES},
    optional={
        "content": VALUES | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": VALUES}), max_size=2),
        "reasoning": VALUES,
        "tool_calls": VALUES | st.lists(CALLS | VALUES, max_size=2),
        "tool_call_id": VALUES,
        "tools": VALUES | st.lists(st.sampled_from([TOOL]) | VALUES, max_size=2),
        "task": VALUES,
    },
)
TURNS = st.fixed_dictionaries({"from": st.sampled_from([*SPEAKERS]) | VALUES}, optional={"value": VALUES})
ROWS = VALUES | st.fixed_dictionaries(
    {},
    optional={
        "text": VALUES,
        "messages": VALUES | st.lists(MESSAGES | VALUES, max_size=4),
        "conversations": VALUES | st.lists(TURNS | MESSAGES, max_size=4),
        "tools": VALUES | st.lists(st.sampled_from([TOOL]) | VALUES, max_size=2),
        "system": VALUES,
    },
)
LINES = ROWS.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=20)


@given(st.lists(LINES, min_size=1, max_size=3), st.sampled_from(["refuse", "replace"]))
def test_any_row_is_a_document_or_refused_by_its_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], bad_text: str
) -> None:
    path = written(tmp_path_factory.getbasetemp(), "drawn.jsonl", b"\n".join(lines))
    try:
        documents = read_documents(path, bad_text)
    except UserError as error:
        told = f"{error.fact}\n{error.hint}".encode()
        assert told.count(b"\n") == 1
        assert error.fact.startswith((f"{path}:", f"{path} holds no document")), error.fact
        return
    assert corpus.encode_documents(TOKENIZER, documents)
