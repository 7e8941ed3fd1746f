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
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo, model_validator

from v4forge.bench.tools import value_matchers
from v4forge.bench.tools.strict_yaml import Described, Model, OnlyTrue, fault, kind_of
from v4forge.bench.tools.value_matchers import AnyMatcher, Pattern
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


# Validation knows the tools that there are, by their names.
Tools = ValidationInfo[dict[str, Any]]


def _known(tool: str, info: Tools) -> str:
    if tool not in info.context:
        raise fault(f"there is no tool {tool}")
    return tool


ToolName = Annotated[str, AfterValidator(_known)]


class Wanted(Model):
    """A call as a rule describes it."""

    tool: ToolName
    arguments: dict[str, AnyMatcher] = Field(default={})

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


class Repeated(Wanted):
    """A call, and how often it has to come."""

    least: int = 1
    most: int | None = None

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if self.least < 1 or (self.most is not None and self.most < self.least):
            raise fault(f"{self.least} to {self.most} calls cannot be asked for", "least")
        return self

    def __str__(self) -> str:
        if (self.least, self.most) == (1, None):
            return super().__str__()
        to = "" if self.most == self.least else "+" if self.most is None else f" to {self.most}"
        return f"{super().__str__()}, {self.least}{to} times"


def _listed(calls: Sequence[Call]) -> str:
    return "; ".join(map(str, calls[:6])) + ("; …" if len(calls) > 6 else "") if calls else "no call"


class Rule(Described):
    """Something that has to be so of a conversation; as text, what."""

    @abstractmethod
    def judge(self, run: Run) -> tuple[bool, str]:
        """Whether it holds, and what was found."""


class Calls(Rule):
    calls: Repeated
    said = "calls {calls}"

    def judge(self, run: Run) -> tuple[bool, str]:
        fit = [each for each in run.calls if self.calls.fits(each)]
        holds = self.calls.least <= len(fit) and (self.calls.most is None or len(fit) <= self.calls.most)
        return holds, f"{len(fit)} times" if fit else self.calls.nearest(run.calls)


class Changes(Rule):
    changes: list[Wanted]

    def __str__(self) -> str:
        return f"changes just {' and '.join(map(str, self.changes)) or 'nothing'}"

    def judge(self, run: Run) -> tuple[bool, str]:
        left = [call for call in run.calls if call.changed]
        done = _listed(left) if left else "nothing was changed"
        for each in self.changes:
            found = next((call for call in left if each.fits(call)), None)
            if found is None:
                return False, f"{each.nearest(left)}; changed: {done}"
            left.remove(found)
        return not left, done if not left else f"also changed: {_listed(left)}"


class Order(Rule):
    order: list[Wanted]

    def __str__(self) -> str:
        return f"order {', then '.join(map(str, self.order))}"

    def judge(self, run: Run) -> tuple[bool, str]:
        turn = 0
        for step in self.order:
            done = [call for call in run.calls if step.fits(call) and not call.failed]
            later = [call.turn for call in done if call.turn > turn]
            if not later:
                return False, f"{step.tool} came too early" if done else f"missing: {step.nearest(run.calls)}"
            turn = min(later)
        return True, "in this order"


class Only(Rule):
    only: list[ToolName]

    def __str__(self) -> str:
        return f"only {', '.join(self.only)}"

    def judge(self, run: Run) -> tuple[bool, str]:
        others = [call for call in run.calls if call.tool not in self.only]
        return not others, _listed(others or run.calls)


class NotCalled(Rule):
    not_called: list[ToolName]

    def __str__(self) -> str:
        return f"not called: {', '.join(self.not_called)}"

    def judge(self, run: Run) -> tuple[bool, str]:
        found = [call for call in run.calls if call.tool in self.not_called]
        return not found, _listed(found or run.calls)


class AtMost(Rule):
    at_most: int
    said = "at most {at_most} calls"

    def judge(self, run: Run) -> tuple[bool, str]:
        return len(run.calls) <= self.at_most, f"{len(run.calls)} calls"


class WellFormed(Rule):
    well_formed: OnlyTrue
    said = "every call is well formed"

    def judge(self, run: Run) -> tuple[bool, str]:
        faulty = [f"{call}: {call.fault}" for call in run.calls if call.fault]
        return not faulty, "; ".join(faulty[:3]) or f"{len(run.calls)} calls"


class Answered(Rule):
    answered: OnlyTrue
    said = "ends with an answer"

    def judge(self, run: Run) -> tuple[bool, str]:
        return run.ended == ANSWERED, run.ended


class AnswerMatches(Rule):
    answer_matches: Pattern
    said = "answer matches /{answer_matches.pattern}/"

    def judge(self, run: Run) -> tuple[bool, str]:
        found = self.answer_matches.search(run.answer)
        return bool(found), short(found[0] if found else run.answer)


class AnswerHasNoneOf(Rule):
    answer_has_none_of: list[Pattern]

    def __str__(self) -> str:
        return f"answer has none of {', '.join(f'/{each.pattern}/' for each in self.answer_has_none_of)}"

    def judge(self, run: Run) -> tuple[bool, str]:
        found = next((match[0] for each in self.answer_has_none_of if (match := each.search(run.answer))), None)
        return found is None, "none" if found is None else short(found)


def _rule(table: Any, info: Tools) -> Rule:
    return kind_of(table, RULES, "rule", info.context)


AnyRule = Annotated[Rule, PlainValidator(_rule)]
Rules = Annotated[list[AnyRule], Field(min_length=1)]


class AnyOf(Rule):
    any_of: Rules

    def __str__(self) -> str:
        return f"({' or '.join(map(str, self.any_of))})"

    def judge(self, run: Run) -> tuple[bool, str]:
        judged = [rule.judge(run) for rule in self.any_of]
        return any(holds for holds, _ in judged), "; ".join(found for _, found in judged)


class AllOf(Rule):
    all_of: Rules

    def __str__(self) -> str:
        return f"({' and '.join(map(str, self.all_of))})"

    def judge(self, run: Run) -> tuple[bool, str]:
        judged = [rule.judge(run) for rule in self.all_of]
        return all(holds for holds, _ in judged), "; ".join(found for _, found in judged)


RULES = (
    *(Calls, Changes, Order, Only, NotCalled, AtMost, WellFormed, Answered),
    *(AnswerMatches, AnswerHasNoneOf, AnyOf, AllOf),
)
