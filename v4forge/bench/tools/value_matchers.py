"""What a value that a model gave may look like, as data: the arguments of a call, the fields of an answer.

A plain value stands for itself, exactly (`45` is also 45.0, never "45"). A table with one of these fields is a form:

    one_of: [a, b]               one of these
    text: some words             the same letters and digits in the same order; case, spaces and signs are free
    regex: ^M-\\d+$               found in the text, in any case
    number: 17.8, within: 0.1    a number near it
    date: 2027-03-17             this day, in any usual form
    time: "14:15"                this time of day, in any usual form
    unless_absent: false         this, or left out
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

from v4forge.bench.tools.strict_yaml import Fault, Table, checked

ABSENT = object()
DATES = ("%Y-%m-%d", "%d.%m.%Y", "%Y/%m/%d", "%Y%m%d", "%d %B %Y", "%B %d %Y", "%d %b %Y", "%b %d %Y", "%m/%d/%Y")
TIME = re.compile(r"(\d{1,2})(?:[:.h](\d{2}))?(?::00)?\s*([ap])?\.?m?\.?", re.IGNORECASE)


@dataclass(frozen=True)
class Matcher:
    """`said` tells people what is looked for."""

    said: str
    holds: Callable[[Any], bool]


def same(wanted: Any, given: Any) -> bool:
    """Equality of JSON values: true is not 1, 1 is 1.0."""
    if isinstance(wanted, bool) or isinstance(given, bool):
        return wanted is given
    if isinstance(wanted, Mapping) and isinstance(given, Mapping):
        return wanted.keys() == given.keys() and all(same(wanted[key], given[key]) for key in wanted)
    if isinstance(wanted, list) and isinstance(given, list):
        return len(wanted) == len(given) and all(map(same, wanted, given))
    return bool(wanted == given)


def letters(text: str) -> str:
    """Only the letters and digits, in lower case."""
    return "".join(character for character in text.casefold() if character.isalnum())


def date_of(given: Any) -> date | None:
    """The day that a text names, alone or with a time after it."""
    if not isinstance(given, str):
        return None
    text = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", given.strip().replace(",", " "))
    text = re.sub(r"^[A-Za-z]+day\s+", "", re.sub(r"[T ]\d{1,2}:\d{2}.*$", "", text))
    for form in DATES:
        try:
            return datetime.strptime(" ".join(text.split()), form).date()
        except ValueError:
            continue
    return None


def minute_of(given: Any) -> int | None:
    """The minute of the day that a text names."""
    found = TIME.fullmatch(given.strip()) if isinstance(given, str) else None
    if not found or not (found[2] or found[3]):
        return None
    hour, minute, half = int(found[1]), int(found[2] or 0), (found[3] or "").lower()
    if half:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if half == "p" else 0)
    return hour * 60 + minute if hour < 24 and minute < 60 else None


def _exact(wanted: Any) -> Matcher:
    return Matcher(json.dumps(wanted, ensure_ascii=False), lambda given: same(wanted, given))


def _one_of(table: Table) -> Matcher:
    values = checked(table, {"one_of": list})["one_of"]
    said = " or ".join(json.dumps(value, ensure_ascii=False) for value in values)
    return Matcher(said, lambda given: any(same(value, given) for value in values))


def _text(table: Table) -> Matcher:
    wanted = checked(table, {"text": str})["text"]
    if not letters(wanted):
        raise table.fault("text", "has neither letter nor digit")
    return Matcher(f"~{wanted!r}", lambda given: isinstance(given, str) and letters(given) == letters(wanted))


def _regex(table: Table) -> Matcher:
    pattern = compiled(checked(table, {"regex": str}), "regex")
    return Matcher(f"/{pattern.pattern}/", lambda given: isinstance(given, str) and bool(pattern.search(given)))


def _number(table: Table) -> Matcher:
    checked(table, {"number": float, "within": float})
    wanted, within = table["number"], table["within"]

    def near(given: Any) -> bool:
        return isinstance(given, int | float) and not isinstance(given, bool) and abs(given - wanted) <= within

    return Matcher(f"{wanted} ± {within}", near)


def _date(table: Table) -> Matcher:
    wanted = date_of(checked(table, {"date": str})["date"])
    if wanted is None:
        raise table.fault("date", f"{table['date']} is no date, as 2027-03-17")
    return Matcher(f"the day {wanted}", lambda given: date_of(given) == wanted)


def _time(table: Table) -> Matcher:
    wanted = minute_of(checked(table, {"time": str})["time"])
    if wanted is None:
        raise table.fault("time", f"{table['time']} is no time, as 14:15")
    return Matcher(f"the time {table['time']}", lambda given: minute_of(given) == wanted)


def _unless_absent(table: Table) -> Matcher:
    wanted = checked(table, {"unless_absent": object})["unless_absent"]
    return Matcher(
        f"{json.dumps(wanted, ensure_ascii=False)}, or left out", lambda given: given is ABSENT or same(wanted, given)
    )


FORMS: dict[str, Callable[[Table], Matcher]] = {
    "one_of": _one_of,
    "text": _text,
    "regex": _regex,
    "number": _number,
    "date": _date,
    "time": _time,
    "unless_absent": _unless_absent,
}


def compiled(table: Table, field: str, pattern: Any = None) -> re.Pattern[str]:
    """The regular expression in a field. Raises Fault."""
    pattern = table[field] if pattern is None else pattern
    try:
        return re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    except (re.error, TypeError) as error:
        raise table.fault(field, f"{pattern!r} is no regular expression: {error}") from None


def matcher(value: Any) -> Matcher:
    """The matcher that a value in a YAML file stands for. Raises Fault."""
    if not isinstance(value, Table):
        return _exact(value)
    form = next((name for name in value if name in FORMS), None)
    if form is None:
        raise Fault(value.line, f"{', '.join(value) or '{}'}: no form of a value; known: {', '.join(FORMS)}")
    return FORMS[form](value)


def matchers(table: Table) -> dict[str, Matcher]:
    """Those of each argument. Raises Fault."""
    return {name: matcher(value) for name, value in table.items()}


def missing(wanted: Mapping[str, Matcher], given: Mapping[str, Any]) -> list[str]:
    """The names of the arguments that are not as wanted; [] when all fit."""
    return [name for name, each in wanted.items() if not each.holds(given.get(name, ABSENT))]


def said(wanted: Mapping[str, Matcher]) -> str:
    return ", ".join(f"{name}: {each.said}" for name, each in wanted.items())
