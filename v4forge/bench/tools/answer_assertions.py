"""What is asserted of an answer, as data: checks with a definite outcome.

answer_is: value or form            the answer without blanks around it (forms: v4forge/bench/tools/value_matchers.py)
answer_json: {field: value or form} the answer, or its code block, is a JSON object with just these fields
answer_matches, answer_has_none_of  as in v4forge/bench/tools/call_assertions.py; ^ and $ are ends of lines
words, sentences, paragraphs: {least, most}
lines: {count, first: regex, others: regex}     lines that are not blank
language: english                   its commonest words are there, and more of them than of any other language's
no_repetition: true                 no sentence twice, few of its phrases
function: {name, cases}             the Python function in the answer, run in a container; needs docker
page: [step]                        the HTML page in the answer, in headless Chromium (bench/tools/page_assertions.py)
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, PlainValidator, model_validator

from v4forge.bench.tools import answer_text, call_assertions, page_assertions, value_matchers
from v4forge.bench.tools.answer_text import LANGUAGES, LEAST_SHARE, code, repeated
from v4forge.bench.tools.call_assertions import Run
from v4forge.bench.tools.page_assertions import AnyStep
from v4forge.bench.tools.strict_yaml import Described, Model, OnlyTrue, fault, kind_of
from v4forge.bench.tools.value_matchers import AnyMatcher, Pattern
from v4forge.serving.client import short

DOCKER, CHROMIUM = "docker", "chromium"  # what a check may need besides the answer

Found = tuple[bool, str]
Outcome = tuple[str, bool, str]  # a name, whether it holds, what was found
Program = Callable[[Sequence[str]], Sequence[Found]]


class Check(Described):
    """What is asked of an answer. needs: docker, chromium or nothing."""

    needs: ClassVar[str] = ""

    @abstractmethod
    def check(self, answer: str, run: Program) -> list[Outcome]:
        """What is told of an answer. run: runs Python programs, and says of each whether it came to its end."""


class One(Check):
    """A check of one outcome; as text, its name."""

    def check(self, answer: str, run: Program) -> list[Outcome]:
        return [(str(self), *self.found(answer))]

    @abstractmethod
    def found(self, answer: str) -> Found:
        """Whether it holds, and what was found."""


class OfRule(One, call_assertions.Rule):
    """A rule over a conversation that also is one over an answer."""

    def found(self, answer: str) -> Found:
        return self.judge(Run(answer))


class AnswerMatches(OfRule, call_assertions.AnswerMatches):
    pass


class AnswerHasNoneOf(OfRule, call_assertions.AnswerHasNoneOf):
    pass


class AnswerIs(One):
    answer_is: AnyMatcher
    said = "answer is {answer_is}"

    def found(self, answer: str) -> Found:
        return self.answer_is.holds(answer.strip()), short(answer.strip())


class AnswerJson(One):
    answer_json: dict[str, AnyMatcher]

    def __str__(self) -> str:
        return f"answer is JSON with {value_matchers.said(self.answer_json)}"

    def found(self, answer: str) -> Found:
        try:
            value = json.loads(code(answer, "{"))
        except (ValueError, RecursionError):
            return False, f"no JSON: {short(answer)}"
        if not isinstance(value, dict):
            return False, f"no object: {short(answer)}"
        wrong = [
            *value_matchers.missing(self.answer_json, value),
            *(each for each in value if each not in self.answer_json),
        ]
        return not wrong, f"otherwise: {', '.join(wrong)}" if wrong else short(value)


class Bounds(Model):
    least: int
    most: int

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if not 0 < self.least <= self.most:
            raise fault(f"{self.least} to {self.most} cannot be asked for", "least")
        return self

    def __str__(self) -> str:
        return f"{self.least} to {self.most}" if self.least < self.most else f"{self.least}"

    def found(self, parts: Sequence[str]) -> Found:
        return self.least <= len(parts) <= self.most, f"{len(parts)}"


class Words(One):
    words: Bounds
    said = "{words} words"

    def found(self, answer: str) -> Found:
        return self.words.found(answer_text.words(answer))


class Sentences(One):
    sentences: Bounds
    said = "{sentences} sentences"

    def found(self, answer: str) -> Found:
        return self.sentences.found(answer_text.sentences(answer))


class Paragraphs(One):
    paragraphs: Bounds
    said = "{paragraphs} paragraphs"

    def found(self, answer: str) -> Found:
        return self.paragraphs.found(answer_text.paragraphs(answer))


class LineForms(Model):
    count: int
    first: Pattern
    others: Pattern


class Lines(One):
    lines: LineForms
    said = "{lines.count} lines, first /{lines.first.pattern}/, others /{lines.others.pattern}/"

    def found(self, answer: str) -> Found:
        form = self.lines
        given = [line for line in answer.splitlines() if line.strip()]
        if len(given) != form.count:
            return False, f"{len(given)} lines"
        wrong = [line for at, line in enumerate(given) if not (form.others if at else form.first).search(line)]
        return not wrong, short(wrong[0]) if wrong else "all"


def _known(language: str) -> str:
    if language not in LANGUAGES:
        raise fault(f"{language} is not known; known: {', '.join(LANGUAGES)}")
    return language


class Language(One):
    language: Annotated[str, AfterValidator(_known)]
    said = "in {language}"

    def found(self, answer: str) -> Found:
        best, share = answer_text.language(answer)
        holds = best == self.language and share >= LEAST_SHARE
        return holds, f"{share:.0%} of its words are among the commonest of {best}"


class NoRepetition(One):
    no_repetition: OnlyTrue
    said = "no repetition"

    def found(self, answer: str) -> Found:
        return not repeated(answer), repeated(answer) or "none"


class Case(Model):
    arguments: list[Any]
    result: Any


def _identifier(name: str) -> str:
    if not name.isidentifier():
        raise fault(f"{name!r} is no name of a function")
    return name


class Tested(Model):
    """A function by its name, and what it has to give."""

    name: Annotated[str, AfterValidator(_identifier)]
    cases: list[Case] = Field(min_length=1)


class Function(Check):
    function: Tested
    needs: ClassVar[str] = DOCKER

    def check(self, answer: str, run: Program) -> list[Outcome]:
        name, cases = self.function.name, self.function.cases
        source = code(answer, rf"\bdef\s+{name}\b")
        found = run([_program(source, name, case) for case in cases])
        names = [f"{name}({', '.join(map(json.dumps, case.arguments))})" for case in cases]
        return [(name, *each) for name, each in zip(names, found, strict=True)]


def _program(source: str, name: str, case: Case) -> str:
    """Runs a case; pairs and lists are the same, as in JSON. It imports nothing: the image may hold a bare Python."""
    return (
        f"{source}\n\n"
        "def _plain(value):\n"
        "    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value\n\n"
        f"_given = _plain({name}(*{_literal(case.arguments)}))\n"
        f"_wanted = {_literal(case.result)}\n"
        'assert _given == _wanted, f"it gave {_given}, not {_wanted}"\n'
    )


def _literal(value: Any) -> str:
    """A JSON value as Python writes it."""
    return repr(json.loads(json.dumps(value)))


class Page(Check):
    page: list[AnyStep] = Field(min_length=1)
    needs: ClassVar[str] = CHROMIUM

    def check(self, answer: str, run: Program) -> list[Outcome]:
        return page_assertions.check(code(answer, "<html|<!doctype|<body"), self.page)


CHECKS = (
    *(AnswerIs, AnswerJson, AnswerMatches, AnswerHasNoneOf, Words, Sentences, Paragraphs, Lines),
    *(Language, NoRepetition, Function, Page),
)


def _check(table: Any) -> Check:
    return kind_of(table, CHECKS, "rule")


AnyCheck = Annotated[Check, PlainValidator(_check)]
