"""What is asserted of a page that a model wrote, as data: steps in order, each with a line that says what it found.

title: regex
texts: selector, matches: regex          what its elements show, a line each
count: selector, least: n, most: n
style: selector, property, matches       the computed style of the first one
click: selector
fits: true                               no text is cut off
quiet: true                              no error in the console, nothing asked of the network
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from v4forge.bench.tools.browser import Opened, PageError, open_page
from v4forge.bench.tools.strict_yaml import Described, OnlyTrue, kind_of
from v4forge.bench.tools.value_matchers import Pattern
from v4forge.serving.client import short

LIMIT_S = 30.0


class Step(Described):
    """Something that is done or looked at on a page; as text, what."""

    @abstractmethod
    def judge(self, opened: Opened) -> tuple[bool, str]:
        """Whether it holds, and what was found. Raises PageError where the page does not do it."""


def check(html: str, steps: Sequence[Step], limit_s: float = LIMIT_S) -> list[tuple[str, bool, str]]:
    """Each step's outcome on a page: what it is, whether it holds, what was found.

    Raises UserError where there is no Chromium.
    """
    found: list[tuple[str, bool, str]] = []
    try:
        with open_page(html, limit_s=limit_s) as opened:
            for step in steps:
                try:
                    found.append((str(step), *step.judge(opened)))
                except PageError as error:
                    found.append((str(step), False, error.fact))
                    if opened.ended.is_set():
                        raise
    except PageError as error:
        found += [(str(step), False, error.fact) for step in steps[len(found) :]]
    return found


class Title(Step):
    title: Pattern
    said = "title /{title.pattern}/"

    def judge(self, opened: Opened) -> tuple[bool, str]:
        return bool(self.title.search(opened.title)), short(opened.title)


class Texts(Step):
    texts: str
    matches: Pattern
    said = "{texts} shows /{matches.pattern}/"

    def judge(self, opened: Opened) -> tuple[bool, str]:
        shown = opened.texts(self.texts)
        return bool(shown and self.matches.search("\n".join(shown))), short(shown) if shown else "no such element"


class Count(Step):
    count: str
    least: int
    most: int
    said = "{least} to {most} of {count}"

    def judge(self, opened: Opened) -> tuple[bool, str]:
        count = opened.count(self.count)
        return self.least <= count <= self.most, f"{count}"


class Style(Step):
    style: str
    name: str = Field(alias="property")
    matches: Pattern
    said = "{name} of {style} /{matches.pattern}/"

    def judge(self, opened: Opened) -> tuple[bool, str]:
        value = opened.style(self.style, self.name)
        return bool(self.matches.search(value)), short(value)


class Click(Step):
    click: str
    said = "a click on {click}"

    def judge(self, opened: Opened) -> tuple[bool, str]:
        opened.click(self.click)
        return True, "clicked"


class Fits(Step):
    fits: OnlyTrue
    said = "every text fits"

    def judge(self, opened: Opened) -> tuple[bool, str]:
        cut = opened.cut_off()
        return not cut, short(cut[0]) if cut else "all"


class Quiet(Step):
    quiet: OnlyTrue
    said = "no error, nothing asked of the network"

    def judge(self, opened: Opened) -> tuple[bool, str]:
        opened.count("html")  # messages under way have come before its answer
        said = [*opened.errors, *(f"asked for {address}" for address in opened.asked)]
        return not said, short(said[0]) if said else "nothing"


STEPS = (Title, Texts, Count, Style, Click, Fits, Quiet)


def _step(table: Any) -> Step:
    return kind_of(table, STEPS, "rule")


AnyStep = Annotated[Step, PlainValidator(_step)]
