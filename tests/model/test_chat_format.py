"""The chat format: prompts recorded from vLLM 0.33's DeepSeek-V4 renderer, and what must hold for any conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.model.chat_format import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER, encode_messages, has_reasoning

RECORDED = json.loads((ROOT / "tests/data/chat_golden.json").read_text(encoding="utf-8"))
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

texts = st.text(st.characters(codec="utf-8", exclude_characters="<>｜"), max_size=20)
values = st.one_of(texts, st.integers(), st.booleans(), st.none())
exchanges = st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **rest: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **rest}


def calling(arguments: Any) -> dict[str, Any]:
    return assistant("", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


def conversation(turns: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    return [m for asked, thought, said in turns for m in (user(asked), assistant(said, reasoning=thought))]


@pytest.mark.parametrize("recorded", RECORDED, ids=[case["case"] for case in RECORDED])
def test_a_prompt_equals_the_one_that_vllm_renders(recorded: dict[str, Any]) -> None:
    messages = recorded["messages"]
    opened = messages[-1]["role"] != "assistant"
    assert encode_messages(messages, thinking=recorded["thinking"], add_generation_prompt=opened) == recorded["prompt"]


def test_tools_given_for_the_conversation_stand_in_its_first_system_message() -> None:
    messages = [user("Hi"), {"role": "system", "content": "Be kind."}, user("Weather?")]
    declared = [messages[0], {**messages[1], "tools": [TOOL]}, messages[2]]
    assert encode_messages(messages, tools=[TOOL]) == encode_messages(declared)


def test_tools_given_without_a_system_message_get_an_empty_one() -> None:
    declared = [{"role": "system", "content": "", "tools": [TOOL]}, user("Weather?")]
    assert encode_messages([user("Weather?")], tools=[TOOL]) == encode_messages(declared)


def test_without_a_generation_prompt_the_last_question_stays_last() -> None:
    assert encode_messages([user("Hi")]) == f"{BOS}{USER}Hi"


def test_reasoning_goes_by_either_of_its_two_names() -> None:
    named = [[user("?"), assistant("!", **{name: "hm"})] for name in ("reasoning", "reasoning_content")]
    assert encode_messages(named[0], thinking=True) == encode_messages(named[1], thinking=True)
    assert has_reasoning(named[0]) and has_reasoning(named[1]) and not has_reasoning([user("?"), assistant("!")])


@given(exchanges)
def test_without_thinking_the_turns_are_their_texts_between_markers(turns: list[tuple[str, str, str]]) -> None:
    expected = BOS + "".join(f"{USER}{asked}{ASSISTANT}{END_THINK}{said}{EOS}" for asked, _, said in turns)
    assert encode_messages(conversation(turns)) == expected


@given(exchanges)
def test_with_thinking_only_the_last_turn_shows_its_reasoning(turns: list[tuple[str, str, str]]) -> None:
    *earlier, (asked, thought, said) = turns
    last = f"{USER}{asked}{ASSISTANT}{THINK}{thought}{END_THINK}{said}{EOS}"
    before = encode_messages(conversation(earlier)) if earlier else BOS
    assert encode_messages(conversation(turns), thinking=True) == before + last


@given(exchanges, st.booleans())
def test_an_open_prompt_continues_into_the_conversation_that_answers_it(
    turns: list[tuple[str, str, str]], thinking: bool
) -> None:
    messages = conversation(turns)
    opened = encode_messages(messages[:-1], thinking=thinking, add_generation_prompt=True)
    assert encode_messages(messages, thinking=thinking).startswith(opened)


@given(st.dictionaries(texts, values, max_size=4))
def test_arguments_mean_the_same_as_an_object_and_as_json(arguments: dict[str, Any]) -> None:
    prompt = encode_messages([user("?"), calling(arguments)])
    assert prompt == encode_messages([user("?"), calling(json.dumps(arguments))])
    assert prompt.count(f"<{DSML}parameter ") == len(arguments)


@pytest.mark.parametrize(
    ("messages", "fact"),
    [
        ([], "without messages"),
        ([{"content": "Hi"}], "message 0 is not an object with a role"),
        (["Hi"], "message 0 is not an object with a role"),
        ([user("Hi"), {"role": "developer", "content": "x"}], "message 1 has the role 'developer'"),
        ([user(None)], "message 0 has no content"),
        ([user(3)], "content is a int"),
        ([user([{"type": "image_url", "image_url": "x"}])], "something other than text"),
        ([user([{"type": "text", "text": None}])], "something other than text"),
        ([{**user("Hi"), "task": "title"}], "'task'"),
        ([{**user("Hi"), "tools": [TOOL]}], "only a system message declares tools"),
        ([{**user("Hi"), "tool_calls": [{}]}], "only the assistant calls tools"),
        ([{"role": "system", "tools": [{"name": "f"}]}], "has no `function`"),
        ([user("?"), calling("{")], "message 1: a tool call"),
        ([user("?"), calling("[1]")], "message 1: a tool call"),
        ([user("?"), assistant("", tool_calls="f")], "message 1: a tool call"),
        ([user("?"), assistant("", reasoning=["x"])], "reasoning is not a string"),
    ],
)
def test_what_the_format_cannot_express_is_refused_by_message(messages: Any, fact: str) -> None:
    with pytest.raises(UserError) as caught:
        encode_messages(messages, thinking=True)
    assert fact in caught.value.fact and caught.value.hint


def test_a_generation_prompt_after_the_assistants_own_turn_is_refused() -> None:
    with pytest.raises(UserError, match="cannot follow"):
        encode_messages([user("Hi"), assistant("Hello")], add_generation_prompt=True)
