"""The report's page in headless Chromium: figures and tables are there; text fits, wide and narrow, light and dark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench_results as made
import pytest
from run_files import DEEP, MANIFEST, RUN, layer

from v4forge.bench.tools.browser import Opened, open_page
from v4forge.reporting import page as report_page
from v4forge.reporting.benches import told
from v4forge.reporting.inputs import Inputs

# Where text stands depends on the width, how it stands out on the scheme.
WIDTHS = ((1280, "light"), (400, "light"))
SCHEMES = ((1280, "light"), (1280, "dark"))
LEAST_PX = 8.5  # letters in a figure
READABLE, VISIBLE = 4.5, 3.0  # contrast of text, and of lines and marks (WCAG 2.2, 1.4.3 and 1.4.11)

# Elements that are wider than their place, unless they or what holds them scroll.
TOO_WIDE = """() => [...document.querySelectorAll('html, body, body *')].filter(element =>
  !element.closest('svg') && !element.closest('.scroll') && element.clientWidth
  && element.scrollWidth > element.clientWidth + 1
).map(element => `${element.tagName} ${element.className}: ${element.textContent.trim().slice(0, 60)}`)"""
SCROLLED = """() => [...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth + 1)
  .map(each => `${each.scrollWidth} in ${each.clientWidth}: ${each.textContent.trim().slice(0, 60)}`)"""
OUTSIDE = """() => [...document.querySelectorAll('svg text')].filter(text => {
  const a = text.getBoundingClientRect(), b = text.closest('svg').getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(text => text.textContent)"""
OVERLAPPING = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return texts.flatMap(([name, a], i) => texts.slice(i + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2
  ).map(([other]) => `${name} / ${other}`));
})"""
LETTERS = """() => [...document.querySelectorAll('svg.figure text')].map(text => {
  const svg = text.closest('svg');
  return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
})"""
COLOURS = """() => {
  const card = getComputedStyle(document.querySelector('section')).backgroundColor;
  const of = (selector, name) => [...document.querySelectorAll(selector)].map(each => getComputedStyle(each)[name]);
  return {card, text: of('svg.figure text', 'fill'), marks: of('svg.figure use', 'stroke'),
          cells: of('.figures td, .figures th, .figures small', 'color')};
}"""


def inputs(*results: dict[str, Any], rest: bool = True) -> Inputs:
    """What a folder with these results holds; rest: and what the demo makes."""
    measured = told({each["bench"]: each for each in results})
    if not rest:
        return Inputs(benches=measured)
    certificate = {"ok": True, "checks": [{"name": "tensors", "ok": True, "detail": "1,012 tensors"}], "deep": DEEP}
    layers = [layer(0), layer(1, True)]
    return Inputs(certificate, layers, RUN, MANIFEST, measured)


def failing() -> list[dict[str, Any]]:
    """Of each bench but half its parts, and why the others are not there, at length."""
    found = made.full()
    for each in found:
        lost = list(each["parts"])[::2]
        each["parts"] = {key: part for key, part in each["parts"].items() if key not in lost}
        each["failures"] = {
            key: {"fact": f"http://127.0.0.1:8000{'/v1/completions' * 8} answered 500", "hint": "make serve-logs " * 9}
            for key in lost
        }
        each["complete"] = False
    return found


def without_k0() -> list[dict[str, Any]]:
    result = made.speed()
    result["parts"] = {key: part for key, part in result["parts"].items() if not key.startswith("k0/")}
    return [result]


def huge_names() -> list[dict[str, Any]]:
    """Names that fit nowhere, of which some have no place to break."""
    word = "incomprehensibilities" * 6
    drafts, tasks, calls = made.draft(), made.quality(), made.tools()
    for number, part in enumerate(list(drafts["parts"].values())):
        part["workload"] = f"{word} {number}"
    tasks["parts"][f"{word} task"] = {**tasks["parts"]["gsm8k"], "task": f"{word} task"}
    for part in calls["parts"].values():
        if "category" in part:
            part["category"] = f"{word} {part['category']}"
            part["why"] = [word]
    for each in (drafts, tasks, calls):
        each["target"]["artifact"]["folder"] = f"/{word}/{word}"
        each["hashes"][word] = "8" * 64
        each["commands"] = [word * 3]
    return [drafts, tasks, calls]


def many_layers() -> list[dict[str, Any]]:
    """As many as Flash has, whose experts saw very different counts of tokens."""
    return [{**layer(i, i % 2 == 1), "tokens": [i, 40 * i + 1000, 800_000 + i]} for i in range(43)]


CASES: dict[str, Callable[[], Inputs]] = {
    "a full set of Flash": lambda: inputs(*made.full()),
    "trials of the tiny model": lambda: inputs(*made.full(tiny=True, trial=4)),
    "no bench": lambda: inputs(),
    "many layers": lambda: replace(inputs(), layers=many_layers()),
    "one bench and nothing else": lambda: inputs(made.draft(), rest=False),
    "failures": lambda: inputs(*failing()),
    "k=0 was not measured": lambda: inputs(*without_k0()),
    "huge names": lambda: inputs(*huge_names()),
}


@pytest.fixture(scope="module", params=CASES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    path: Path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(report_page.page(CASES[request.param]()), encoding="utf-8")
    with open_page(path, limit_s=120) as page:
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        yield page


@pytest.fixture
def look(request: pytest.FixtureRequest, opened: Opened) -> Opened:
    width, scheme = request.param
    opened.page.set_viewport_size({"width": width, "height": 900})
    opened.page.emulate_media(color_scheme=scheme)
    return opened


in_both = partial(pytest.mark.parametrize, "look", indirect=True, ids=lambda look: f"{look[0]} {look[1]}")


@in_both(WIDTHS)
def test_text_fits_its_place(look: Opened) -> None:
    assert look.evaluate(TOO_WIDE) == []
    assert look.cut_off() == []


def test_on_a_telephone_no_table_has_a_part_outside(opened: Opened) -> None:
    opened.page.set_viewport_size({"width": 400, "height": 900})
    assert opened.evaluate(SCROLLED) == []


@in_both(WIDTHS)
def test_text_of_figures_is_inside_them_apart_and_large_enough(look: Opened) -> None:
    assert look.evaluate(OUTSIDE) == []
    assert look.evaluate(OVERLAPPING) == []
    assert all(size >= LEAST_PX for size in look.evaluate(LETTERS))


@in_both(SCHEMES)
def test_text_and_marks_stand_out_from_the_card(look: Opened) -> None:
    colours = look.evaluate(COLOURS)
    for name, least in (("text", READABLE), ("cells", READABLE), ("marks", VISIBLE)):
        for colour in set(colours[name]):
            assert contrast(colour, colours["card"]) >= least, (name, colour)


def test_the_page_asks_for_nothing_and_complains_of_nothing(opened: Opened) -> None:
    assert opened.errors == [] and opened.asked == []


def contrast(one: str, other: str) -> float:
    """Of two colours as rgb(r, g, b), 1 to 21 (WCAG 2.2)."""
    levels = sorted(luminance(colour) for colour in (one, other))
    return (levels[1] + 0.05) / (levels[0] + 0.05)


def luminance(colour: str) -> float:
    parts = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("opened", ["a full set of Flash"], indirect=True)
def test_every_figure_and_table_is_there(opened: Opened) -> None:
    shapes, metrics = ("256x256", "1024x1024"), ("tpot_ms", "output_tok_s")
    figures = [f"speed-{metric}-{shape}" for shape in shapes for metric in metrics]
    speed = [f"speed-{name}-{shape}" for shape in shapes for name in ("k", "pareto")]
    layers = ("loss-w1", "loss-w2", "loss-w3", "tokens", "starved")
    for name in (*figures, *speed, "draft-all", "draft-given", "quality-delta", *layers):
        assert opened.count(f"#figure-{name} svg[role=img] use") > 1, name
        assert opened.count(f"#figure-{name} svg > title") == 1 and opened.count(f"#figure-{name} svg > desc") == 1
    for name in ("glance", "headline", "prediction", "speed", "draft", "draft-given", "quality", "tools", "smoke"):
        assert opened.count(f"#{name} tbody tr") > 1, name
    titles = opened.texts("h2")
    assert {"Losses by layer", "Certificate: ok", "Provenance", "Ours beside what was published"} <= set(titles)
    assert opened.count("#certificate tbody tr") == 1
    assert "not measured" not in " ".join(opened.texts("#glance td"))
    assert opened.count("[id^=bench-] details dl") == 4, "how each bench was measured"


def test_pointing_at_a_mark_says_its_figure() -> None:
    text = report_page.page(inputs(made.speed(), rest=False))
    assert re.search(r"<g><title>k=3, concurrency 16: [\d.,]+ ms</title>", text)
    assert "<title>published, k=1, concurrency 16: 367.13 tok/s</title>" in text
