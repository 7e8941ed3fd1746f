"""v4forge.bench.workloads: the prompts of the benches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4forge.bench import workloads
from v4forge.bench.workloads import WRITTEN
from v4forge.errors import UserError
from v4forge.model.corpus import load_tokenizer

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
WORDS = workloads.vocabulary(TINY)


@pytest.mark.parametrize("workload", WRITTEN)
def test_a_workload_has_fifty_prompts_that_differ(workload: str) -> None:
    prompts = workloads.written(workload)
    assert len(prompts) >= 50
    assert len({each.id for each in prompts}) == len(prompts)
    begins = {json.dumps(each.asked)[:80] for each in prompts if "messages" not in each.asked}
    whole = {json.dumps(each.asked) for each in prompts}
    assert len(whole) == len(prompts) and len(begins) in (0, len(prompts))


@pytest.mark.parametrize("workload", WRITTEN)
def test_the_prompts_are_of_many_kinds(workload: str) -> None:
    kinds = [each.kind for each in workloads.written(workload)]
    assert len(set(kinds)) >= 12
    assert max(map(kinds.count, kinds)) <= len(kinds) / 5


@pytest.mark.parametrize("workload", WRITTEN)
def test_the_prompts_fit_the_smallest_context_with_their_answers(workload: str) -> None:
    tokenizer = load_tokenizer(TINY)
    for prompt in workloads.written(workload):
        texts = (
            [prompt.asked["prompt"]] if "prompt" in prompt.asked else [m["content"] for m in prompt.asked["messages"]]
        )
        length = sum(len(tokenizer.encode(text)) for text in texts)
        assert 2 <= length <= 2048 - workloads.ANSWER_TOKENS - 100, prompt.id
        assert all(text == text.rstrip() for text in texts), (
            f"{prompt.id}: white space at the end is a token of its own"
        )


def test_chats_end_with_the_user_and_some_have_several_turns() -> None:
    chats = [each.asked["messages"] for each in workloads.written("chat")]
    for messages in chats:
        roles = [each["role"] for each in messages if each["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert sum(len(messages) > 2 for messages in chats) >= 8


def test_random_ids_follow_from_the_seed_and_only_such_answers_go_on_over_the_end() -> None:
    ids = WORDS.drawable
    some = workloads.drawn(ids, seed=1)
    assert some == workloads.drawn(ids, seed=1) != workloads.drawn(ids, seed=2)
    assert all(len(each.asked["prompt"]) == 256 and set(each.asked["prompt"]) <= set(ids) for each in some)
    assert all(each.asked["ignore_eos"] for each in some) and len(some) >= 50
    assert not any("ignore_eos" in each.asked for name in WRITTEN for each in workloads.written(name))


def test_what_is_drawn_are_whole_characters_and_no_control_tokens() -> None:
    added = {each["id"] for each in json.loads((TINY / "tokenizer.json").read_text())["added_tokens"]}
    texts = [WORDS.tokenizer.decode([each]) for each in WORDS.drawable]
    assert not set(WORDS.drawable) & added and len(WORDS.drawable) > 800
    assert all(text and "\ufffd" not in text for text in texts)


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer"):
        workloads.vocabulary(tmp_path)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32))
def test_a_prompt_is_read_as_exactly_so_many_tokens_none_of_them_special(tokens: int, seed: int) -> None:
    (prompt,) = workloads.random_prompts(WORDS, tokens, 1, str(seed))
    read = WORDS.tokenizer.encode(prompt).ids
    assert len(read) == tokens and not set(read) & set(WORDS.tokenizer.get_added_tokens_decoder())


def test_prompts_follow_from_the_seed_and_are_all_different() -> None:
    prompts = workloads.random_prompts(WORDS, 32, 50, "seed")
    assert len(set(prompts)) == 50 and prompts == workloads.random_prompts(WORDS, 32, 50, "seed")
    assert not set(prompts) & set(workloads.random_prompts(WORDS, 32, 50, "another"))


@pytest.mark.parametrize("line", ["", "[1]", '{"id": "a"}', '{"id": "a", "kind": "b"', '{"text": "x", "kind": "b"}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "code.jsonl").write_text('{"id": "a", "kind": "b", "text": "c"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"code.jsonl:2 is not a prompt"):
        workloads.written("code", tmp_path)
