"""The chat smoke: one prompt, one answer, checks with a definite outcome; from v4forge/bench/data/smoke.yaml.

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
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge.bench.tools import call_assertions, page_assertions, strict_yaml, value_matchers
from v4forge.bench.tools.call_assertions import Run
from v4forge.bench.tools.chat_client import Reply
from v4forge.bench.tools.page_assertions import Step
from v4forge.bench.tools.scenarios import faults_of
from v4forge.bench.tools.strict_yaml import Table, checked, only_true, rows
from v4forge.serving.client import short

FILE = Path(__file__).parents[1] / "data" / "smoke.yaml"
GROUPS = {"quick": 4, "quality": 4, "coding": 2}  # prompts each, as published
PREFIX = "smoke"
DOCKER, CHROMIUM = "docker", "chromium"  # what a check may need besides the answer

# The commonest words of each language that are not words of the others.
LANGUAGES = {
    "english": "the of and to is that it with as was for on are by this be from have",
    "german": "der die das und ist nicht ein eine einen mit sich auf den dem im zu sie von als",
    "french": "le les et est une dans que qui pour pas sur avec elle il ce des du au",
    "spanish": "el los las y es una que por con para del se no su lo al como más",
}
LEAST_SHARE = 0.06  # of a text's words; terse lists have few of the commonest
PHRASE = 4  # words
MOST_REPEATED = 0.15  # of its phrases
BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
# A point within a number ends no sentence.
END = re.compile(r"[.!?…]+(?=[\"'”’“»)\]]*(?:\s|$))")

Found = tuple[bool, str]
Program = Callable[[Sequence[str]], Sequence[Found]]


@dataclass(frozen=True)
class Check:
    """judge: of an answer, what is told of it: name, whether it holds, detail. needs: docker, chromium or nothing."""

    judge: Callable[[str, Program], list[tuple[str, bool, str]]]
    needs: str = ""


@dataclass(frozen=True)
class Prompt:
    group: str
    name: str
    about: str
    text: str
    max_tokens: int
    checks: Sequence[Check]

    @property
    def key(self) -> str:
        return f"{PREFIX}/{self.group}/{self.name}"

    @property
    def needs(self) -> set[str]:
        return {check.needs for check in self.checks if check.needs}


def load(path: Path = FILE) -> list[Prompt]:
    """The prompts, by group. Raises UserError for what is wrong in the file."""
    table = strict_yaml.load(path)
    with faults_of(path):
        checked(table, {"max_tokens": dict, **dict.fromkeys(GROUPS, list)})
        checked(table["max_tokens"], dict.fromkeys(GROUPS, int))
        listed = {group: rows(table, group) for group in GROUPS}
        for group, count in GROUPS.items():
            if len(listed[group]) != count:
                raise table.fault(group, f"{len(listed[group])} prompts, not {count}")
    found: list[Prompt] = []
    for group, prompts in listed.items():
        for number, row in enumerate(prompts, start=1):
            name = row.get("id", f"{group} {number}")
            with faults_of(path, str(name)):
                checked(row, {"id": str, "about": str, "prompt": str, "checks": list})
                if name in [each.name for each in found]:
                    raise row.fault("id", f"{name} is there twice")
                checks = call_assertions.rules(row, "checks", (), CHECKS)
            found.append(Prompt(group, name, row["about"], row["prompt"], table["max_tokens"][group], checks))
    return found


def part(prompt: Prompt, ask: Callable[[str], Reply], run: Program) -> dict[str, Any]:
    """Asks, and checks the answer: its part of the result file.

    run: runs Python programs in containers and says of each whether it came to its end. Raises UserError when the
    model cannot be asked, or a check cannot be made.
    """
    begun_s = time.monotonic()
    reply = ask(prompt.text)
    answered_s = time.monotonic() - begun_s
    whole = reply.finish != "length" and bool(reply.text.strip())
    found = [("a whole answer", whole, reply.finish if reply.text.strip() else "empty")]
    for check in prompt.checks:
        found += check.judge(reply.text, run)
    return {
        "group": prompt.group,
        "id": prompt.name,
        "about": prompt.about,
        "ok": all(ok for _, ok, _ in found),
        "checks": [{"name": name, "ok": ok, "detail": detail} for name, ok, detail in found],
        "prompt": prompt.text,
        "answer": reply.text,
        **reply.thoughts,
        "finish_reason": reply.finish,
        "usage": dict(reply.usage),
        "elapsed_s": round(answered_s, 3),
    }


def code(answer: str, wanted: str) -> str:
    """The code in an answer: of its code blocks the one in which `wanted` is found, else the longest; without any,
    the whole answer."""
    blocks = [match[2] for match in BLOCK.finditer(answer)]
    holding = [block for block in blocks if re.search(wanted, block, re.IGNORECASE)]
    return max(holding or blocks, key=len, default=answer)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def sentences(text: str) -> list[str]:
    return [each.strip() for each in END.split(text) if words(each)]


def paragraphs(text: str) -> list[str]:
    return [each for each in re.split(r"\n\s*\n", text) if each.strip()]


def language(text: str) -> tuple[str, float]:
    """The likeliest of LANGUAGES, and the share of the text's words that are its commonest."""
    counts = Counter(word.casefold() for word in words(text))
    total = max(1, counts.total())
    shares = {name: sum(counts[word] for word in common.split()) / total for name, common in LANGUAGES.items()}
    best = max(shares, key=lambda name: shares[name])
    return best, shares[best]


def repeated(text: str) -> str:
    """The sentence that comes twice, or how many of its phrases do; "" where that is as it should be."""
    said = [" ".join(words(each)).casefold() for each in sentences(text)]
    twice = next((each for each, count in Counter(said).items() if count > 1 and len(each.split()) >= PHRASE), "")
    if twice:
        return f"twice: {short(twice)}"
    spoken = [word.casefold() for word in words(text)]
    phrases = Counter(tuple(spoken[at : at + PHRASE]) for at in range(len(spoken) - PHRASE + 1))
    share = 1 - len(phrases) / phrases.total() if phrases else 0.0
    return f"{share:.0%} of its phrases of {PHRASE} words are repeated" if share > MOST_REPEATED else ""


def _rule(kind: str) -> Callable[[Table, Sequence[str]], Check]:
    """A rule over tool calls that also is one over an answer."""

    def build(table: Table, tools: Sequence[str]) -> Check:
        rule = call_assertions.RULES[kind](table, tools)
        return Check(lambda answer, _run: [(rule.said, *rule.judge(Run(answer)))])

    return build


def _answer_is(table: Table, _tools: Sequence[str]) -> Check:
    wanted = value_matchers.matcher(checked(table, {"answer_is": object})["answer_is"])
    return Check(
        lambda answer, _run: [(f"answer is {wanted.said}", wanted.holds(answer.strip()), short(answer.strip()))]
    )


def _answer_json(table: Table, _tools: Sequence[str]) -> Check:
    fields = value_matchers.matchers(checked(table, {"answer_json": dict})["answer_json"])
    name = f"answer is JSON with {value_matchers.said(fields)}"

    def judge(answer: str, _run: Program) -> list[tuple[str, bool, str]]:
        try:
            value = json.loads(code(answer, "{"))
        except (ValueError, RecursionError):
            return [(name, False, f"no JSON: {short(answer)}")]
        if not isinstance(value, dict):
            return [(name, False, f"no object: {short(answer)}")]
        wrong = [*value_matchers.missing(fields, value), *(each for each in value if each not in fields)]
        return [(name, not wrong, f"otherwise: {', '.join(wrong)}" if wrong else short(value))]

    return Check(judge)


def _count(kind: str, split: Callable[[str], Sequence[str]]) -> Callable[[Table, Sequence[str]], Check]:
    def build(table: Table, _tools: Sequence[str]) -> Check:
        bounds = checked(checked(table, {kind: dict})[kind], {"least": int, "most": int})
        least, most = bounds["least"], bounds["most"]
        if not 0 < least <= most:
            raise bounds.fault("least", f"{least} to {most} {kind} cannot be asked for")
        name = f"{least} to {most} {kind}" if least < most else f"{least} {kind}"

        def judge(answer: str, _run: Program) -> list[tuple[str, bool, str]]:
            count = len(split(answer))
            return [(name, least <= count <= most, f"{count}")]

        return Check(judge)

    return build


def _lines(table: Table, _tools: Sequence[str]) -> Check:
    form = checked(checked(table, {"lines": dict})["lines"], {"count": int, "first": str, "others": str})
    first, others = value_matchers.compiled(form, "first"), value_matchers.compiled(form, "others")
    name = f"{form['count']} lines, first /{first.pattern}/, others /{others.pattern}/"

    def judge(answer: str, _run: Program) -> list[tuple[str, bool, str]]:
        given = [line for line in answer.splitlines() if line.strip()]
        if len(given) != form["count"]:
            return [(name, False, f"{len(given)} lines")]
        wrong = [line for at, line in enumerate(given) if not (others if at else first).search(line)]
        return [(name, not wrong, short(wrong[0]) if wrong else "all")]

    return Check(judge)


def _language(table: Table, _tools: Sequence[str]) -> Check:
    wanted = checked(table, {"language": str})["language"]
    if wanted not in LANGUAGES:
        raise table.fault("language", f"{wanted} is not known; known: {', '.join(LANGUAGES)}")

    def judge(answer: str, _run: Program) -> list[tuple[str, bool, str]]:
        best, share = language(answer)
        holds = best == wanted and share >= LEAST_SHARE
        return [(f"in {wanted}", holds, f"{share:.0%} of its words are among the commonest of {best}")]

    return Check(judge)


def _no_repetition(table: Table, _tools: Sequence[str]) -> Check:
    only_true(table, "no_repetition")
    return Check(lambda answer, _run: [("no repetition", not repeated(answer), repeated(answer) or "none")])


def _function(table: Table, _tools: Sequence[str]) -> Check:
    form = checked(checked(table, {"function": dict})["function"], {"name": str, "cases": list})
    if not form["name"].isidentifier():
        raise form.fault("name", f"{form['name']!r} is no name of a function")
    cases = [checked(row, {"arguments": list, "result": object}) for row in rows(form, "cases")]
    if not cases:
        raise form.fault("cases", "holds none")

    def judge(answer: str, run: Program) -> list[tuple[str, bool, str]]:
        source = code(answer, rf"\bdef\s+{form['name']}\b")
        names = [f"{form['name']}({', '.join(map(json.dumps, case['arguments']))})" for case in cases]
        found = run([_program(source, form["name"], case) for case in cases])
        return [(name, *each) for name, each in zip(names, found, strict=True)]

    return Check(judge, DOCKER)


def _program(source: str, name: str, case: Mapping[str, Any]) -> str:
    """Runs a case; pairs and lists are the same, as in JSON. It imports nothing: the image may hold a bare Python."""
    return (
        f"{source}\n\n"
        "def _plain(value):\n"
        "    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value\n\n"
        f"_given = _plain({name}(*{_literal(case['arguments'])}))\n"
        f"_wanted = {_literal(case['result'])}\n"
        'assert _given == _wanted, f"it gave {_given}, not {_wanted}"\n'
    )


def _literal(value: Any) -> str:
    """A JSON value as Python writes it."""
    return repr(json.loads(json.dumps(value)))


def _page(table: Table, _tools: Sequence[str]) -> Check:
    steps: list[Step] = call_assertions.rules(checked(table, {"page": list}), "page", (), page_assertions.STEPS)
    return Check(lambda answer, _run: page_assertions.check(code(answer, "<html|<!doctype|<body"), steps), CHROMIUM)


CHECKS: dict[str, Callable[[Table, Sequence[str]], Check]] = {
    "answer_is": _answer_is,
    "answer_json": _answer_json,
    "answer_matches": _rule("answer_matches"),
    "answer_has_none_of": _rule("answer_has_none_of"),
    "words": _count("words", words),
    "sentences": _count("sentences", sentences),
    "paragraphs": _count("paragraphs", paragraphs),
    "lines": _lines,
    "language": _language,
    "no_repetition": _no_repetition,
    "function": _function,
    "page": _page,
}


def counts(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """By group: how many were ok, of how many that were asked."""
    found: dict[str, tuple[int, int]] = {}
    for group in GROUPS:
        own = [part for key, part in parts.items() if key.startswith(f"{PREFIX}/{group}/")]
        if own:
            found[group] = sum(part["ok"] for part in own), len(own)
    return found
