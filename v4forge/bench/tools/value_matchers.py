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
from abc import abstractmethod
from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator

from v4forge.bench.tools.strict_yaml import Described, fault, kind_of

ABSENT = object()
DATES = ("%Y-%m-%d", "%d.%m.%Y", "%Y/%m/%d", "%Y%m%d", "%d %B %Y", "%B %d %Y", "%d %b %Y", "%b %d %Y", "%m/%d/%Y")
TIME = re.compile(r"(\d{1,2})(?:[:.h](\d{2}))?(?::00)?\s*([ap])?\.?m?\.?", re.IGNORECASE)


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


class Matcher(Described):
    """A form of a value; as text, what is looked for."""

    @abstractmethod
    def holds(self, given: Any) -> bool:
        """Whether a value is as wanted; ABSENT stands for none."""


class Exact(Matcher):
    value: Any

    def __str__(self) -> str:
        return _json(self.value)

    def holds(self, given: Any) -> bool:
        return same(self.value, given)


class OneOf(Matcher):
    one_of: list[Any]

    def __str__(self) -> str:
        return " or ".join(map(_json, self.one_of))

    def holds(self, given: Any) -> bool:
        return any(same(value, given) for value in self.one_of)


def _spelt(text: str) -> str:
    if not letters(text):
        raise fault("has neither letter nor digit")
    return text


class Text(Matcher):
    text: Annotated[str, AfterValidator(_spelt)]
    said = "~{text!r}"

    def holds(self, given: Any) -> bool:
        return isinstance(given, str) and letters(given) == letters(self.text)


def _compiled(pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise fault(f"{pattern!r} is not text")
    try:
        return re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    except re.error as error:
        raise fault(f"{pattern!r} is no regular expression: {error}") from None


# In any case; ^ and $ are ends of lines.
Pattern = Annotated[re.Pattern[str], PlainValidator(_compiled)]


class Regex(Matcher):
    regex: Pattern
    said = "/{regex.pattern}/"

    def holds(self, given: Any) -> bool:
        return isinstance(given, str) and bool(self.regex.search(given))


class Number(Matcher):
    number: float
    within: float
    said = "{number:.15g} ± {within:.15g}"

    def holds(self, given: Any) -> bool:
        if isinstance(given, bool) or not isinstance(given, int | float):
            return False
        try:
            return abs(given - self.number) <= self.within
        except OverflowError:  # a whole number beyond every float
            return False


def _day(text: Any) -> date:
    day = date_of(text)
    if day is None:
        raise fault(f"{text} is no date, as 2027-03-17")
    return day


class Day(Matcher):
    date: Annotated[date, PlainValidator(_day)]
    said = "the day {date}"

    def holds(self, given: Any) -> bool:
        return date_of(given) == self.date


def _time(text: str) -> str:
    if minute_of(text) is None:
        raise fault(f"{text} is no time, as 14:15")
    return text


class Time(Matcher):
    time: Annotated[str, AfterValidator(_time)]
    said = "the time {time}"

    def holds(self, given: Any) -> bool:
        return minute_of(given) == minute_of(self.time)


class UnlessAbsent(Matcher):
    unless_absent: Any

    def __str__(self) -> str:
        return f"{_json(self.unless_absent)}, or left out"

    def holds(self, given: Any) -> bool:
        return given is ABSENT or same(self.unless_absent, given)


FORMS = (OneOf, Text, Regex, Number, Day, Time, UnlessAbsent)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def matcher(value: Any) -> Matcher:
    """The matcher that a value in a YAML file stands for. Raises ValidationError."""
    return kind_of(value, FORMS, "form of a value") if isinstance(value, dict) else Exact(value=value)


AnyMatcher = Annotated[Matcher, PlainValidator(matcher)]


def missing(wanted: Mapping[str, Matcher], given: Mapping[str, Any]) -> list[str]:
    """The names of the arguments that are not as wanted; [] when all fit."""
    return [name for name, each in wanted.items() if not each.holds(given.get(name, ABSENT))]


def said(wanted: Mapping[str, Matcher]) -> str:
    return ", ".join(f"{name}: {each}" for name, each in wanted.items())
