"""Plays the tool-calling scenarios with a model, and scores them: pass 2, partial 1, fail 0.

The model is asked, its calls are answered from the scenario's table, and it is asked again, until it answers without a
call or a limit ends the conversation. The same answers give the same trace and score.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v4forge.bench.tools.call_assertions import ANSWERED, Call, Rule, Run
from v4forge.bench.tools.chat_client import Asked, Reply, TooLong
from v4forge.bench.tools.scenarios import CATEGORIES, EACH, Scenario, Suite, call_id, text_of
from v4forge.serving.client import short

PASS, PARTIAL = 2, 1
MOST = PASS * EACH * len(CATEGORIES)
# How a conversation may end otherwise than with an answer.
TURNS, TOKENS, EMPTY, FLOOD, FULL = (
    "limit of turns",
    "limit of tokens",
    "empty answer",
    "too many calls in a turn",
    "context is full",
)
CALLS_A_TURN = 16

Message = dict[str, Any]
Ask = Callable[[Sequence[Mapping[str, Any]], Sequence[Any]], Reply]


@dataclass(frozen=True)
class Played:
    """A scenario's run, and all that was said in it: messages as sent, the model's turns as they came."""

    run: Run
    trace: list[Message]


def part(suite: Suite, scenario: Scenario, ask: Ask) -> dict[str, Any]:
    """Plays a scenario: its part of the result file. Raises UserError when the model cannot be asked."""
    begun_s = time.monotonic()
    played = play(suite, scenario, ask)
    points, why = score(scenario, played.run)
    return {
        "category": scenario.category,
        "scenario": scenario.name,
        "about": scenario.about,
        "score": points,
        "most": PASS,
        "why": why,
        "turns": played.run.turns,
        "calls": len(played.run.calls),
        "ended": played.run.ended,
        "answer": played.run.answer,
        "elapsed_s": round(time.monotonic() - begun_s, 3),
        "trace": played.trace,
    }


def play(suite: Suite, scenario: Scenario, ask: Ask) -> Played:
    """The conversation, to its end. ask: messages and tools to the model's next turn."""
    messages: list[Message] = [{"role": "system", "content": suite.system}, *scenario.messages]
    trace = list(messages)
    tools = [tool.offer() for tool in suite.tools.values()]
    calls: list[Call] = []
    asked: Counter[int] = Counter()

    def ended(how: str, answer: str, turn: int) -> Played:
        return Played(Run(answer, calls, how, turn), trace)

    for turn in range(1, suite.max_turns + 1):
        try:
            reply = ask(messages, tools)
        except TooLong:
            if turn == 1:
                raise
            return ended(FULL, "", turn - 1)
        trace.append(
            {
                "role": "assistant",
                "content": reply.text,
                **reply.thoughts,
                "calls": [vars(each) for each in reply.calls],
                "finish_reason": reply.finish,
                "usage": dict(reply.usage),
            }
        )
        if not reply.calls:
            how = TOKENS if reply.finish == "length" else ANSWERED if reply.text.strip() else EMPTY
            return ended(how, reply.text, turn)
        said: list[Message] = []
        for number, each in enumerate(reply.calls[:CALLS_A_TURN]):
            call, answer = _call(suite, scenario, each, turn, asked)
            calls.append(call)
            said.append({"role": "tool", "tool_call_id": call_id(turn, number), "content": text_of(answer)})
        trace += said
        if len(reply.calls) > CALLS_A_TURN or reply.finish == "length":
            return ended(TOKENS if reply.finish == "length" else FLOOD, "", turn)
        messages += [_sent_back(reply, turn), *said]
    return ended(TURNS, "", suite.max_turns)


def _call(suite: Suite, scenario: Scenario, asked: Asked, turn: int, counts: Counter[int]) -> tuple[Call, Any]:
    """What becomes of a call: itself as the rules see it, and the tool's answer. counts: of each result, how often."""
    tool = suite.tools.get(asked.name)
    arguments = _object(asked.arguments)
    if tool is None:
        fault = f"there is no tool {short(asked.name)}"
    elif arguments is None:
        fault = "the arguments are no JSON object"
    else:
        fault = tool.fault(arguments)
    if fault or tool is None:
        call = Call(turn, asked.name, arguments or {}, asked.arguments, fault, failed=True)
        return call, {"error": fault}
    for number, result in enumerate(scenario.results):
        if result.fits(tool.name, arguments or {}):
            answer = result.answers[min(counts[number], len(result.answers) - 1)]
            counts[number] += 1
            break
    else:
        answer = {"error": "it does not answer"}
    failed = isinstance(answer, Mapping) and "error" in answer
    return (
        Call(turn, tool.name, arguments or {}, asked.arguments, failed=failed, changed=tool.changes and not failed),
        answer,
    )


def _object(text: str) -> dict[str, Any] | None:
    """The arguments, {} where a tool is called with nothing at all."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _sent_back(reply: Reply, turn: int) -> Message:
    """The model's turn as the next request has it: with ids of ours, and with {} for arguments that are no object,
    which the server's chat encoding could not take."""
    calls = [
        {
            "id": call_id(turn, number),
            "type": "function",
            "function": {
                "name": each.name,
                "arguments": each.arguments if each.arguments.strip() and _object(each.arguments) is not None else "{}",
            },
        }
        for number, each in enumerate(reply.calls)
    ]
    return {"role": "assistant", "content": reply.text, **reply.thoughts, "tool_calls": calls}


def score(scenario: Scenario, run: Run) -> tuple[int, list[str]]:
    """The points, and a line for each rule that was looked at: those of a pass, then those of a partial one."""
    whole, why = _judged("pass", scenario.passes, run)
    if whole:
        return PASS, why
    some, more = _judged("partial", scenario.partial, run)
    return PARTIAL if some else 0, [*why, *more]


def _judged(name: str, rules: Sequence[Rule], run: Run) -> tuple[bool, list[str]]:
    judged = [(rule, *rule.judge(run)) for rule in rules]
    lines = [f"{name}: {'holds' if holds else 'fails'}: {rule}: {found}" for rule, holds, found in judged]
    return all(holds for _, holds, _ in judged), lines


def points(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """By category: points, and how many there were to get, in the scenarios that were played."""
    found: dict[str, tuple[int, int]] = {}
    for category in CATEGORIES:
        own = [part for key, part in parts.items() if key.startswith(f"{category}/")]
        if own:
            found[category] = sum(part["score"] for part in own), sum(part["most"] for part in own)
    return found
