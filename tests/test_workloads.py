"""v4forge.workloads: the prompts that drafts are counted on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from v4forge import workloads
from v4forge.corpus import load_tokenizer
from v4forge.errors import UserError
from v4forge.workloads import WRITTEN

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"


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


def test_random_prompts_follow_from_the_seed() -> None:
    ids = list(range(30, 1000))
    some = workloads.drawn(5, 256, ids, seed=1)
    assert some == workloads.drawn(9, 256, ids, seed=1)[:5]
    assert some != workloads.drawn(5, 256, ids, seed=2)
    assert all(len(each.asked["prompt"]) == 256 and set(each.asked["prompt"]) <= set(ids) for each in some)


def test_control_tokens_are_not_drawn() -> None:
    ids = workloads.vocabulary(TINY)
    added = json.loads((TINY / "tokenizer.json").read_text())["added_tokens"]
    assert set(ids) == set(range(1024)) - {each["id"] for each in added}


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json does not tell the vocabulary"):
        workloads.vocabulary(tmp_path)


@pytest.mark.parametrize("line", ["", "[1]", '{"id": "a"}', '{"id": "a", "kind": "b"', '{"text": "x", "kind": "b"}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "code.jsonl").write_text('{"id": "a", "kind": "b", "text": "c"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"code.jsonl:2 is not a prompt"):
        workloads.written("code", tmp_path)


def test_only_random_prompts_go_on_over_the_end() -> None:
    asked = [each.asked for name in WRITTEN for each in workloads.written(name)]
    assert not any("ignore_eos" in each for each in asked)
    assert workloads.drawn(1, 4, [5, 6], 0)[0].asked["ignore_eos"]
