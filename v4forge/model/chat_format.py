"""The DeepSeek-V4 chat format: messages in, one prompt string out.

V4 ships no chat template; its model card publishes the format as a program. What is here is the part that a
calibration corpus needs (system, user, assistant and tool messages, reasoning, tools), equal to what vLLM 0.33
renders for them at its default reasoning effort. One conversation looks like this, without the line breaks between
the turns:

    <bos>{system}
    <｜User｜>{question}
    <｜Assistant｜></think>{answer}<eos>                     chat: the think block is closed at once
    <｜Assistant｜><think>{reasoning}</think>{answer}<eos>   thinking

A tool result is part of a user turn, so a `tool` message joins the user turn around it. Reasoning is kept only after
the last user turn, except where tools are declared: then all of it stays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from v4forge.errors import UserError
from v4forge.model.chat_messages import Call, Message, Tool, parsed

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

# The wording that the model was trained on, as published with it: data, not ours to improve.
_TOOLS_PROMPT = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside {THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

%s

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""  # noqa: E501


def encode_messages(
    messages: list[Any],
    *,
    thinking: bool = False,
    add_generation_prompt: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """The prompt string of a conversation, beginning with BOS; every assistant turn ends with EOS.

    messages: `{"role", "content"}` in the OpenAI form; an assistant message may carry `reasoning` (or
    `reasoning_content`) and `tool_calls`, a system message `tools`. `tools` declares them for the conversation, in
    its first system message.
    thinking: whether assistant turns show their reasoning; without it, reasoning is left out.
    add_generation_prompt: open the assistant's turn after the last message, which must not be the assistant's.

    Raises UserError for a message that the format, or this part of it, cannot express.
    """
    if not messages:
        raise UserError("a conversation without messages", 'give at least one {"role": "user", "content": "..."}')
    found = _declared(*parsed(messages, tools))
    if add_generation_prompt and found[-1].role == "assistant":
        raise UserError(
            f"message {len(messages) - 1}: a generation prompt cannot follow the assistant's own turn",
            "end the conversation with a user, tool or system message, or leave add_generation_prompt off",
        )
    turns = _turns(found)
    keep_reasoning = any(turn.tools for turn in turns if isinstance(turn, Message))
    last_user = max((i for i, turn in enumerate(turns) if isinstance(turn, list)), default=-1)

    out = [BOS]
    for index, turn in enumerate(turns):
        if isinstance(turn, Message) and turn.role == "assistant":
            reasons = thinking and (keep_reasoning or index > last_user)
            out += [turn.reason, END_THINK] if reasons else []
            out += [turn.text, _tool_calls(turn.tool_calls or []), EOS]
            continue
        out += [_system(turn)] if isinstance(turn, Message) else [USER, "\n\n".join(turn)]
        following = turns[index + 1] if index + 1 < len(turns) else None
        answered = isinstance(following, Message) and following.role == "assistant"
        if answered or (following is None and add_generation_prompt):
            opens = thinking and (keep_reasoning or index >= last_user)
            out += [ASSISTANT, THINK if opens else END_THINK]
    return "".join(out)


def has_reasoning(messages: Sequence[Any]) -> bool:
    """Whether any message carries reasoning, which only `thinking=True` shows."""
    named = ("reasoning", "reasoning_content")
    return any(message.get(name) for message in messages if isinstance(message, dict) for name in named)


def _declared(messages: list[Message], tools: list[Tool]) -> list[Message]:
    """The messages with `tools` in the first system message, which is made if there is none."""
    if not tools:
        return messages
    first = next((i for i, message in enumerate(messages) if message.role == "system"), None)
    if first is None:
        return [Message(role="system", tools=tools), *messages]
    return [*messages[:first], messages[first].model_copy(update={"tools": tools}), *messages[first + 1 :]]


def _turns(messages: list[Message]) -> list[Message | list[str]]:
    """One entry a turn: neighbouring user and tool messages become one user turn, a list of texts.

    Within a turn, tool results are put into the order of the calls that they answer; texts keep their places.
    """
    turns: list[Message | list[str]] = []
    order: dict[str, int] = {}
    results: list[tuple[int, int]] = []  # (rank of the call, position among the turn's texts)

    def settle() -> None:
        if len(results) > 1 and order:
            blocks = turns[-1]
            assert isinstance(blocks, list)
            texts = [blocks[place] for _, place in sorted(results, key=lambda result: result[0])]
            for (_, place), text in zip(results, texts, strict=True):
                blocks[place] = text
        results.clear()

    for message in messages:
        if message.role in ("user", "tool"):
            if not turns or not isinstance(turns[-1], list):
                turns.append([])
            blocks = turns[-1]
            assert isinstance(blocks, list)
            if message.role == "tool":
                results.append((order.get(message.tool_call_id or "", 0), len(blocks)))
                blocks.append(f"<tool_result>{message.text}</tool_result>")
            else:
                blocks.append(message.text)
            continue
        settle()
        if message.tool_calls:
            order = {call.id: rank for rank, call in enumerate(message.tool_calls) if call.id}
        turns.append(message)
    settle()
    return turns


def _system(message: Message) -> str:
    if not message.tools:
        return message.text
    schemas = "\n".join(json.dumps(tool.function, ensure_ascii=False) for tool in message.tools)
    return message.text + "\n\n" + _TOOLS_PROMPT.replace("%s", schemas)


def _tool_calls(calls: list[Call]) -> str:
    """The DSML block of an assistant's calls, with the blank line before it, or an empty string."""
    if not calls:
        return ""
    invocations = []
    for call in calls:
        lines = [_parameter(key, value) for key, value in call.function.arguments.items()]
        invocations.append(f'<{DSML}invoke name="{call.function.name}">\n' + "\n".join(lines) + f"\n</{DSML}invoke>")
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(invocations) + f"\n</{DSML}tool_calls>"


def _parameter(key: str, value: Any) -> str:
    is_string = isinstance(value, str)
    text = value if is_string else json.dumps(value, ensure_ascii=False)
    return f'<{DSML}parameter name="{key}" string="{str(is_string).lower()}">{text}</{DSML}parameter>'
