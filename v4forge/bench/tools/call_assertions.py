"""What counts, as data: rules over what a model called and answered, each with a line that says what it found.

    calls: {tool, arguments, least: 1, most}   so many of its calls fit
    changes: [{tool, arguments}, …]            just these calls that change something succeeded, in any order
    order: [{tool, arguments}, …]              calls that succeeded, each in a later turn than the one before
    only: [tool, …]                            no other tool was called
    not_called: [tool, …]                      nor was any of these tried
    at_most: n                                 calls in all
    well_formed: true                          each call named a tool that is there, with arguments as its schema asks
    answered: true                             the last turn was an answer, not the limit of turns or tokens
    answer_matches: regex                      found in the answer, in any case
    answer_has_none_of: [regex, …]             none is
    any_of: [rules]   all_of: [rules]

Arguments are matched as v4forge/bench/tools/value_matchers.py says; those that a rule does not name are free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from v4forge.bench.tools import value_matchers
from v4forge.bench.tools.strict_yaml import Fault, Table, checked, only_true, rows
from v4forge.bench.tools.value_matchers import Matcher
from v4forge.serving.client import short

ANSWERED = "answered"


@dataclass(frozen=True)
class Call:
    """One call of a model. fault: why it reached no tool, "" if it did; failed: the tool's answer was an error;
    changed: it changed something."""

    turn: int
    tool: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    raw: str = ""
    fault: str = ""
    failed: bool = False
    changed: bool = False

    def __str__(self) -> str:
        given = json.dumps(self.arguments, ensure_ascii=False) if self.arguments else self.raw
        return f"{self.tool}({short(given)[1:-1]})"


@dataclass(frozen=True)
class Run:
    """A conversation that has ended: how, what was called, the last answer."""

    answer: str
    calls: Sequence[Call] = ()
    ended: str = ANSWERED
    turns: int = 1


@dataclass(frozen=True)
class Rule:
    """judge: whether it holds, and what was found."""

    said: str
    judge: Callable[[Run], tuple[bool, str]]


@dataclass(frozen=True)
class Wanted:
    """A call as a rule describes it."""

    tool: str
    arguments: Mapping[str, Matcher]

    def fits(self, call: Call) -> bool:
        return not call.fault and call.tool == self.tool and not value_matchers.missing(self.arguments, call.arguments)

    def __str__(self) -> str:
        return f"{self.tool}({value_matchers.said(self.arguments)})"

    def nearest(self, calls: Sequence[Call]) -> str:
        """What came closest, and which arguments were otherwise."""
        same = [call for call in calls if call.tool == self.tool and not call.fault]
        if not same:
            return f"no call of {self.tool}"
        call = min(same, key=lambda each: len(value_matchers.missing(self.arguments, each.arguments)))
        other = value_matchers.missing(self.arguments, call.arguments)
        return f"{call}: {', '.join(other)} otherwise" if other else f"{call}"


def wanted(table: Any, line: int, tools: Sequence[str], more: Mapping[str, type] | None = None) -> Wanted:
    """The call that a rule describes; more: further fields that the rule reads. Raises Fault."""
    if not isinstance(table, Table):
        raise Fault(line, f"{table!r} is not a call: {{tool, arguments}}")
    checked(table, {"tool": str}, {"arguments": dict, **(more or {})})
    known(table, "tool", [table["tool"]], tools)
    return Wanted(table["tool"], value_matchers.matchers(table.get("arguments", Table())))


def known(table: Table, name: str, given: Sequence[str], tools: Sequence[str]) -> None:
    """Raises Fault for a tool that the suite does not have."""
    for tool in given:
        if tool not in tools:
            raise table.fault(name, f"there is no tool {tool}")


def _listed(calls: Sequence[Call]) -> str:
    return "; ".join(map(str, calls[:6])) + ("; …" if len(calls) > 6 else "") if calls else "no call"


def _calls(table: Table, tools: Sequence[str]) -> Rule:
    inner = checked(table, {"calls": dict})["calls"]
    call = wanted(inner, table.line, tools, {"least": int, "most": int})
    most = inner.get("most")
    least = inner.get("least", 1)
    if least < 1 or (most is not None and most < least):
        raise inner.fault("least", f"{least} to {most} calls cannot be asked for")

    def judge(run: Run) -> tuple[bool, str]:
        fit = [each for each in run.calls if call.fits(each)]
        holds = least <= len(fit) and (most is None or len(fit) <= most)
        return holds, f"{len(fit)} times" if fit else call.nearest(run.calls)

    many = f", {least}{'' if most == least else '+' if most is None else f' to {most}'} times"
    return Rule(f"calls {call}{many if (least, most) != (1, None) else ''}", judge)


def _changes(table: Table, tools: Sequence[str]) -> Rule:
    calls = [wanted(row, table.line, tools) for row in checked(table, {"changes": list})["changes"]]

    def judge(run: Run) -> tuple[bool, str]:
        left = [call for call in run.calls if call.changed]
        done = _listed(left) if left else "nothing was changed"
        for each in calls:
            found = next((call for call in left if each.fits(call)), None)
            if found is None:
                return False, f"{each.nearest(left)}; changed: {done}"
            left.remove(found)
        return not left, done if not left else f"also changed: {_listed(left)}"

    return Rule(f"changes just {' and '.join(map(str, calls)) or 'nothing'}", judge)


def _order(table: Table, tools: Sequence[str]) -> Rule:
    steps = [wanted(row, table.line, tools) for row in checked(table, {"order": list})["order"]]

    def judge(run: Run) -> tuple[bool, str]:
        turn = 0
        for step in steps:
            done = [call for call in run.calls if step.fits(call) and not call.failed]
            later = [call.turn for call in done if call.turn > turn]
            if not later:
                return False, f"{step.tool} came too early" if done else f"missing: {step.nearest(run.calls)}"
            turn = min(later)
        return True, "in this order"

    return Rule(f"order {', then '.join(map(str, steps))}", judge)


def _only(table: Table, tools: Sequence[str]) -> Rule:
    allowed = rows(checked(table, {"only": list}), "only", str)
    known(table, "only", allowed, tools)

    def judge(run: Run) -> tuple[bool, str]:
        others = [call for call in run.calls if call.tool not in allowed]
        return not others, _listed(others or run.calls)

    return Rule(f"only {', '.join(allowed)}", judge)


def _not_called(table: Table, tools: Sequence[str]) -> Rule:
    refused = rows(checked(table, {"not_called": list}), "not_called", str)
    known(table, "not_called", refused, tools)

    def judge(run: Run) -> tuple[bool, str]:
        found = [call for call in run.calls if call.tool in refused]
        return not found, _listed(found or run.calls)

    return Rule(f"not called: {', '.join(refused)}", judge)


def _at_most(table: Table, _tools: Sequence[str]) -> Rule:
    most = checked(table, {"at_most": int})["at_most"]
    return Rule(f"at most {most} calls", lambda run: (len(run.calls) <= most, f"{len(run.calls)} calls"))


def _well_formed(table: Table, _tools: Sequence[str]) -> Rule:
    only_true(table, "well_formed")

    def judge(run: Run) -> tuple[bool, str]:
        faulty = [f"{call}: {call.fault}" for call in run.calls if call.fault]
        return not faulty, "; ".join(faulty[:3]) or f"{len(run.calls)} calls"

    return Rule("every call is well formed", judge)


def _answered(table: Table, _tools: Sequence[str]) -> Rule:
    only_true(table, "answered")
    return Rule("ends with an answer", lambda run: (run.ended == ANSWERED, run.ended))


def _answer_matches(table: Table, _tools: Sequence[str]) -> Rule:
    pattern = value_matchers.compiled(checked(table, {"answer_matches": str}), "answer_matches")

    def judge(run: Run) -> tuple[bool, str]:
        found = pattern.search(run.answer)
        return bool(found), short(found[0] if found else run.answer)

    return Rule(f"answer matches /{pattern.pattern}/", judge)


def _answer_has_none_of(table: Table, _tools: Sequence[str]) -> Rule:
    name = "answer_has_none_of"
    patterns: list[re.Pattern[str]] = [
        value_matchers.compiled(table, name, row) for row in rows(checked(table, {name: list}), name, str)
    ]

    def judge(run: Run) -> tuple[bool, str]:
        found = next((match[0] for each in patterns if (match := each.search(run.answer))), None)
        return found is None, "none" if found is None else short(found)

    return Rule(f"answer has none of {', '.join(f'/{each.pattern}/' for each in patterns)}", judge)


def _combined(name: str, whole: Callable[[Sequence[bool]], bool], word: str) -> Callable[[Table, Sequence[str]], Rule]:
    def build(table: Table, tools: Sequence[str]) -> Rule:
        inner = rules(checked(table, {name: list}), name, tools)

        def judge(run: Run) -> tuple[bool, str]:
            judged = [rule.judge(run) for rule in inner]
            return whole([holds for holds, _ in judged]), "; ".join(found for _, found in judged)

        return Rule(f"({f' {word} '.join(rule.said for rule in inner)})", judge)

    return build


RULES: dict[str, Callable[[Table, Sequence[str]], Rule]] = {
    "calls": _calls,
    "changes": _changes,
    "order": _order,
    "only": _only,
    "not_called": _not_called,
    "at_most": _at_most,
    "well_formed": _well_formed,
    "answered": _answered,
    "answer_matches": _answer_matches,
    "answer_has_none_of": _answer_has_none_of,
    "any_of": _combined("any_of", any, "or"),
    "all_of": _combined("all_of", all, "and"),
}


def rules(
    table: Table,
    name: str,
    tools: Sequence[str] = (),
    kinds: Mapping[str, Callable[[Table, Sequence[str]], Any]] = RULES,
) -> list[Any]:
    """The rules in a field of a table, of these kinds. Raises Fault."""
    if not table[name]:
        raise table.fault(name, "holds no rule")
    built = []
    for row in rows(table, name):
        kind = next((each for each in row if each in kinds), None)
        if kind is None:
            raise Fault(row.line, f"{', '.join(row) or '{}'}: no rule; known: {', '.join(kinds)}")
        built.append(kinds[kind](row, tools))
    return built
