"""How the embedded model's texts are made, on small documents, and what the committed ones must keep."""

from __future__ import annotations

import ast
import json
import random
import re
from pathlib import Path

import pytest

from dev.tiny.chats import conversations
from dev.tiny.text import CALIBRATION_BYTES, HELDOUT_BYTES, HIDDEN_TOKENS, Document, split, standard_library
from v4forge.model import corpus_rows

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"


def passages(documents: list[str]) -> set[str]:
    """Paragraphs of at least 160 characters, whatever their line breaks."""
    words = (" ".join(passage.split()) for document in documents for passage in re.split(r"\n\s*\n", document))
    return {passage for passage in words if len(passage) >= 160}


def documents(count: int) -> list[Document]:
    """Sources and topics of a few kB each in random words; every fifth repeats a passage of the one before it."""
    source = random.Random(0)
    made: list[Document] = []
    for index in range(count):
        text = "\n\n".join(" ".join(str(source.random()) for _ in range(40)) for _ in range(source.randint(3, 8)))
        if index % 5 == 1:
            text += "\n\n" + made[-1].text.split("\n\n")[0]
        function = f'def f{index}():\n    """Returns the number {index}, and explains at some length why."""\n'
        kind = "topics.py#" if index % 3 == 0 else "m"
        made.append(Document(f"{kind}{index}.py", f"{function}\n\ndata = '''\n{text}\n'''\n"))
    return made


def test_the_parts_hold_every_document_once_and_share_no_passage() -> None:
    made = documents(300)
    parts = split(made)
    dealt = [parts.train, parts.calibration, parts.talkative, parts.heldout]
    assert all(dealt)
    assert sorted(d.name for part in dealt for d in part) == sorted(d.name for d in made)
    seen = [passages([d.text for d in part]) for part in dealt]
    assert sum(map(len, seen)) == len(set().union(*seen))


@pytest.mark.parametrize("kind", ["prose", "source"])
def test_a_committed_part_stays_within_its_bytes_of_each_kind(kind: str) -> None:
    parts = split(documents(300))
    for part, budgets in ((parts.heldout, HELDOUT_BYTES), (parts.calibration, CALIBRATION_BYTES)):
        assert 0.9 * budgets[kind] < sum(d.bytes for d in part if d.kind == kind) <= budgets[kind]


def test_the_split_does_not_depend_on_the_order_of_the_files() -> None:
    made = documents(300)
    assert {d.name for d in split(made).heldout} == {d.name for d in split(made[::-1]).heldout}


def test_tests_tables_and_machine_files_are_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "b/c.py", "test/d.py", "b/tests/e.py", "html/entities.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\r\n", encoding="utf-8", newline="")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data/topics.py").write_text("topics = {'assert': 'Text.', 'and': 'More.'}\n", encoding="utf-8")
    found = standard_library(tmp_path)
    assert [d.name for d in found] == ["a.py", "b/c.py", "pydoc_data/topics.py#and", "pydoc_data/topics.py#assert"]
    assert found[0].text == "x = 1\n" and [d.kind for d in found] == ["source", "source", "prose", "prose"]


def test_every_form_of_conversation_can_be_read_as_a_prompt() -> None:
    body = "\n".join(
        f'def f{i}(a, b={i}):\n    """Adds a to b and returns the sum of both, {i} times."""' for i in range(64)
    )
    lines = list(conversations("pkg/__init__.py", body))
    prompts = [corpus_rows.document_of(line) for line in lines]
    assert len(prompts) == 64 and all("pkg.f" in prompt and "Adds a to b" in prompt for prompt in prompts)
    assert {"tools" in line for line in lines} == {True, False}
    assert any("<think>" in prompt for prompt in prompts) and any("def f1(a, b=1)" in prompt for prompt in prompts)


def test_the_committed_held_out_and_calibration_texts_share_no_passage() -> None:
    lines = [json.loads(line) for line in (TINY / "calibration.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [line["text"] if "text" in line else line["messages"][1].get("content") or "" for line in lines]
    assert not passages(texts) & passages(corpus_rows.read_documents(TINY / "heldout.txt"))


def test_the_committed_sources_are_whole_files() -> None:
    for document in corpus_rows.read_documents(TINY / "heldout.txt"):
        if document.startswith(("import ", "from ", '"""', "#")):
            ast.parse(document)


def test_only_the_hidden_tokens_are_marked_special() -> None:
    added = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    assert tuple(token["content"] for token in added if token["special"]) == HIDDEN_TOKENS
