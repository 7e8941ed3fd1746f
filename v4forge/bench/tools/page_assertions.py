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

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from v4forge.bench.tools import value_matchers
from v4forge.bench.tools.browser import Opened, PageError, open_page
from v4forge.bench.tools.strict_yaml import Table, checked, only_true
from v4forge.serving.client import short

LIMIT_S = 30.0


@dataclass(frozen=True)
class Step:
    """judge: whether it holds, and what was found. Raises PageError where the page does not do it."""

    said: str
    judge: Callable[[Opened], tuple[bool, str]]


def check(html: str, steps: Sequence[Step], limit_s: float = LIMIT_S) -> list[tuple[str, bool, str]]:
    """Each step's outcome on a page: what it is, whether it holds, what was found.

    Raises UserError where there is no Chromium.
    """
    found: list[tuple[str, bool, str]] = []
    try:
        with open_page(html, limit_s=limit_s) as opened:
            for step in steps:
                try:
                    found.append((step.said, *step.judge(opened)))
                except PageError as error:
                    found.append((step.said, False, error.fact))
                    if opened.ended.is_set():
                        raise
    except PageError as error:
        found += [(step.said, False, error.fact) for step in steps[len(found) :]]
    return found


def _title(table: Table, _tools: Sequence[str]) -> Step:
    pattern = value_matchers.compiled(checked(table, {"title": str}), "title")
    return Step(f"title /{pattern.pattern}/", lambda opened: (bool(pattern.search(opened.title)), short(opened.title)))


def _texts(table: Table, _tools: Sequence[str]) -> Step:
    checked(table, {"texts": str, "matches": str})
    pattern = value_matchers.compiled(table, "matches")

    def judge(opened: Opened) -> tuple[bool, str]:
        shown = opened.texts(table["texts"])
        return bool(shown) and bool(pattern.search("\n".join(shown))), short(shown) if shown else "no such element"

    return Step(f"{table['texts']} shows /{pattern.pattern}/", judge)


def _count(table: Table, _tools: Sequence[str]) -> Step:
    checked(table, {"count": str, "least": int, "most": int})

    def judge(opened: Opened) -> tuple[bool, str]:
        count = opened.count(table["count"])
        return table["least"] <= count <= table["most"], f"{count}"

    return Step(f"{table['least']} to {table['most']} of {table['count']}", judge)


def _style(table: Table, _tools: Sequence[str]) -> Step:
    checked(table, {"style": str, "property": str, "matches": str})
    pattern = value_matchers.compiled(table, "matches")

    def judge(opened: Opened) -> tuple[bool, str]:
        value = opened.style(table["style"], table["property"])
        return bool(pattern.search(value)), short(value)

    return Step(f"{table['property']} of {table['style']} /{pattern.pattern}/", judge)


def _click(table: Table, _tools: Sequence[str]) -> Step:
    selector = checked(table, {"click": str})["click"]

    def judge(opened: Opened) -> tuple[bool, str]:
        opened.click(selector)
        return True, "clicked"

    return Step(f"a click on {selector}", judge)


def _fits(table: Table, _tools: Sequence[str]) -> Step:
    only_true(table, "fits")

    def judge(opened: Opened) -> tuple[bool, str]:
        cut = opened.cut_off()
        return not cut, short(cut[0]) if cut else "all"

    return Step("every text fits", judge)


def _quiet(table: Table, _tools: Sequence[str]) -> Step:
    only_true(table, "quiet")

    def judge(opened: Opened) -> tuple[bool, str]:
        opened.count("html")  # messages under way have come before its answer
        said = [*opened.errors, *(f"asked for {address}" for address in opened.asked)]
        return not said, short(said[0]) if said else "nothing"

    return Step("no error, nothing asked of the network", judge)


STEPS: dict[str, Callable[[Table, Sequence[str]], Step]] = {
    "title": _title,
    "texts": _texts,
    "count": _count,
    "style": _style,
    "click": _click,
    "fits": _fits,
    "quiet": _quiet,
}
