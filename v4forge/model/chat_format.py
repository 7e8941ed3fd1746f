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
from typing import Any

from v4forge.errors import UserError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

Message = dict[str, Any]

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

_ROLES = ("system", "user", "assistant", "tool")
_UNSUPPORTED_KEYS = ("task", "response_format", "wo_eos")


def encode_messages(
    messages: list[Message],
    *,
    thinking: bool = False,
    add_generation_prompt: bool = False,
    tools: list[Message] | None = None,
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
    for index, message in enumerate(messages):
        _check(message, index)
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise UserError(
            f"message {len(messages) - 1}: a generation prompt cannot follow the assistant's own turn",
            "end the conversation with a user, tool or system message, or leave add_generation_prompt off",
        )
    turns = _turns(_declare(messages, tools))
    keep_reasoning = any(turn.get("tools") for turn in turns)
    last_user = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)

    out = [BOS]
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            reasons = thinking and (keep_reasoning or index > last_user)
            out += [_reasoning(turn), END_THINK] if reasons else []
            out += [_text(turn, index), _tool_calls(turn, index), EOS]
            continue
        out += [USER, "\n\n".join(turn["blocks"])] if turn["role"] == "user" else [_system(turn, index)]
        following = turns[index + 1]["role"] if index + 1 < len(turns) else None
        if following == "assistant" or (following is None and add_generation_prompt):
            opens = thinking and (keep_reasoning or index >= last_user)
            out += [ASSISTANT, THINK if opens else END_THINK]
    return "".join(out)


def has_reasoning(messages: list[Message]) -> bool:
    """Whether any message carries reasoning, which only `thinking=True` shows."""
    return any(_reasoning(message) for message in messages if isinstance(message, dict))


def _check(message: Message, index: int) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"message {index} is not an object with a role", 'write {"role": "user", "content": "..."}')
    role = message["role"]
    if role not in _ROLES:
        raise UserError(f"message {index} has the role '{role}'", f"use one of {', '.join(_ROLES)}")
    for key in _UNSUPPORTED_KEYS:
        if message.get(key):
            raise UserError(f"message {index} carries '{key}', which is not supported", "remove that key")
    if message.get("tools") and role != "system":
        raise UserError(f"message {index}: only a system message declares tools", "move `tools` to a system message")
    if message.get("tool_calls") and role != "assistant":
        raise UserError(f"message {index}: only the assistant calls tools", "move `tool_calls` to an assistant message")
    if not isinstance(_reasoning(message), str):
        raise UserError(f"message {index}: reasoning is not a string", "give `reasoning` as a string")
    if role in ("user", "tool") and message.get("content") is None:
        raise UserError(f"message {index} has no content", "give its `content` as a string")


def _declare(messages: list[Message], tools: list[Message] | None) -> list[Message]:
    """The messages with `tools` in the first system message, which is made if there is none."""
    if not tools:
        return messages
    first = next((i for i, message in enumerate(messages) if message["role"] == "system"), None)
    if first is None:
        return [{"role": "system", "tools": tools}, *messages]
    return [*messages[:first], {**messages[first], "tools": tools}, *messages[first + 1 :]]


def _turns(messages: list[Message]) -> list[Message]:
    """One entry a turn: neighbouring user and tool messages become one user turn with `blocks` of text.

    Within a turn, tool results are put into the order of the calls that they answer; texts keep their places.
    """
    turns: list[Message] = []
    order: dict[str, int] = {}
    results: list[tuple[int, int]] = []  # (rank of the call, position among the turn's blocks)

    def settle() -> None:
        if len(results) > 1 and order:
            blocks = turns[-1]["blocks"]
            texts = [blocks[place] for _, place in sorted(results, key=lambda result: result[0])]
            for (_, place), text in zip(results, texts, strict=True):
                blocks[place] = text
        results.clear()

    for index, message in enumerate(messages):
        role = message["role"]
        if role in ("user", "tool"):
            if not turns or turns[-1]["role"] != "user":
                turns.append({"role": "user", "blocks": []})
            blocks = turns[-1]["blocks"]
            if role == "tool":
                results.append((order.get(message.get("tool_call_id", ""), 0), len(blocks)))
                blocks.append(f"<tool_result>{_text(message, index)}</tool_result>")
            else:
                blocks.append(_text(message, index))
            continue
        settle()
        if role == "assistant" and message.get("tool_calls"):
            calls = enumerate(message["tool_calls"])
            order = {call["id"]: rank for rank, call in calls if isinstance(call, dict) and call.get("id")}
        turns.append(message)
    settle()
    return turns


def _text(message: Message, index: int) -> str:
    """The content as one string; a list of text blocks is joined by blank lines."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        texts = [block.get("text") for block in content if isinstance(block, dict) and block.get("type") == "text"]
        strings = [text for text in texts if isinstance(text, str)]
        if len(strings) == len(content):
            return "\n\n".join(strings)
        raise UserError(f"message {index} holds something other than text", "leave images and other blocks out")
    raise UserError(f"message {index}: content is a {type(content).__name__}", "give `content` as a string")


def _reasoning(message: Message) -> Any:
    return message.get("reasoning") or message.get("reasoning_content") or ""


def _system(message: Message, index: int) -> str:
    text = _text(message, index)
    if not message.get("tools"):
        return text
    try:
        schemas = [json.dumps(tool["function"], ensure_ascii=False) for tool in message["tools"]]
    except (KeyError, TypeError) as error:
        hint = 'declare {"type": "function", "function": {...}}'
        raise UserError("a declared tool has no `function`", hint) from error
    return text + "\n\n" + _TOOLS_PROMPT.replace("%s", "\n".join(schemas))


def _tool_calls(message: Message, index: int) -> str:
    """The DSML block of an assistant's calls, with the blank line before it, or an empty string."""
    if not message.get("tool_calls"):
        return ""
    invocations = []
    for call in message["tool_calls"]:
        try:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            lines = [_parameter(key, value) for key, value in arguments.items()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"message {index}: a tool call without a name and a JSON object of arguments",
                'write {"function": {"name": "...", "arguments": "{...}"}}',
            ) from error
        invocations.append(f'<{DSML}invoke name="{name}">\n' + "\n".join(lines) + f"\n</{DSML}invoke>")
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(invocations) + f"\n</{DSML}tool_calls>"


def _parameter(key: str, value: Any) -> str:
    is_string = isinstance(value, str)
    text = value if is_string else json.dumps(value, ensure_ascii=False)
    return f'<{DSML}parameter name="{key}" string="{str(is_string).lower()}">{text}</{DSML}parameter>'
