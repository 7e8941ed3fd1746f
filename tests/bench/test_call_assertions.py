"""Rules and forms of values: what holds, what does not, and what is told of it."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4forge.bench.tools import call_assertions, strict_yaml, value_matchers
from v4forge.bench.tools.call_assertions import Call, Run
from v4forge.bench.tools.strict_yaml import Table
from v4forge.errors import UserError

TOOLS = ("read", "write")


def table(**fields: Any) -> Table:
    found = Table(fields)
    found.line, found.lines = 1, {}
    return found


def holds(form: Any, value: Any) -> bool:
    return value_matchers.matcher(form).holds(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_a_value_is_the_same_as_itself_and_as_no_wrapped_one(value: Any) -> None:
    assert value_matchers.same(value, value)
    assert not value_matchers.same(value, [value])


def test_true_is_not_one_and_one_is_a_number_with_a_point() -> None:
    assert not value_matchers.same(True, 1) and not value_matchers.same(0, False)
    assert value_matchers.same(45, 45.0) and not value_matchers.same(45, "45")


@given(st.floats(-1e6, 1e6), st.floats(0, 10), st.floats(-2, 2))
def test_a_number_is_near_within_its_tolerance(wanted: float, within: float, part: float) -> None:
    value = wanted + part * within
    assert holds(table(number=wanted, within=within), value) == (abs(value - wanted) <= within)


DAYS = st.dates(date(1990, 1, 1), date(2090, 1, 1))
FORMS = ["%Y-%m-%d", "%d.%m.%Y", "%d %B %Y", "%B %d, %Y", "%A, %d %B %Y", "%Y-%m-%dT14:15:00", "%d %b %Y", "%Y/%m/%d"]


@given(DAYS, st.sampled_from(FORMS))
def test_a_day_is_known_in_every_usual_form(day: date, form: str) -> None:
    assert value_matchers.date_of(day.strftime(form)) == day
    assert not holds(table(date=str(day + timedelta(days=1))), day.strftime(form))


@given(st.integers(0, 23), st.integers(0, 59))
def test_a_time_is_known_with_24_hours_and_with_12(hour: int, minute: int) -> None:
    wanted = hour * 60 + minute
    half = "pm" if hour >= 12 else "am"
    for text in (f"{hour:02}:{minute:02}", f"{hour}:{minute:02}:00", f"{hour % 12 or 12}:{minute:02} {half}"):
        assert value_matchers.minute_of(text) == wanted, text


@given(JSON)
def test_no_value_upsets_a_form(value: Any) -> None:
    for form in (
        table(one_of=["a"]),
        table(text="a"),
        table(regex="a"),
        table(number=1, within=1),
        table(date="2027-03-17"),
        table(time="14:15"),
        table(unless_absent=False),
    ):
        assert holds(form, value) in (True, False)


def test_words_are_the_same_whatever_signs_are_between() -> None:
    assert holds(table(text="Kiln #2 — don't!"), "kiln #2 - DON’T")
    assert not holds(table(text="Kiln #2"), "Kiln #3")


def rule(**fields: Any) -> call_assertions.Rule:
    outer = table(rules=[table(**fields)])
    (found,) = call_assertions.rules(outer, "rules", TOOLS)
    return found


READ = Call(1, "read", {"room": "a"})
WRITTEN = Call(2, "write", {"room": "a"}, changed=True)
REFUSED = Call(2, "write", {"room": "a"}, failed=True)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [([READ, WRITTEN], True), ([WRITTEN], True), ([READ], False), ([REFUSED], False), ([WRITTEN, WRITTEN], False)],
)
def test_changes_are_those_that_succeeded_and_no_others(calls: list[Call], expected: bool) -> None:
    wanted = rule(changes=[table(tool="write", arguments=table(room="a"))])
    assert wanted.judge(Run("", calls))[0] is expected


def test_an_order_asks_for_later_turns() -> None:
    wanted = rule(order=[table(tool="read"), table(tool="write")])
    assert wanted.judge(Run("", [READ, WRITTEN]))[0]
    assert wanted.judge(Run("", [READ, Call(1, "write")])) == (False, "write came too early")
    assert not wanted.judge(Run("", [READ, REFUSED]))[0]


def test_a_failed_rule_says_what_came_closest() -> None:
    wanted = rule(calls=table(tool="read", arguments=table(room="b", floor=1)))
    near = Call(1, "read", {"room": "b", "floor": 2})
    assert wanted.judge(Run("", [READ, near]))[1] == 'read({"room": "b", "floor": 2}): floor otherwise'


def test_a_call_that_is_not_well_formed_fits_no_rule_but_counts() -> None:
    broken = Call(1, "read", {"room": "a"}, fault="arguments: …", failed=True)
    run = Run("", [broken])
    assert not rule(calls=table(tool="read")).judge(run)[0]
    assert not rule(well_formed=True).judge(run)[0]
    assert not rule(at_most=0).judge(run)[0]
    assert not rule(not_called=["read"]).judge(run)[0]


def load(tmp_path: Path, text: str) -> Table:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return strict_yaml.load(path)


def test_plain_words_stay_words(tmp_path: Path) -> None:
    found = load(tmp_path, "a: 14:15\nb: no\nc: 2027-03-17\nd: 007\ne: 1.5\nf: -3\ng: true\nh: null\ni: 1e5\n")
    assert list(found.values()) == ["14:15", "no", "2027-03-17", "007", 1.5, -3, True, None, "1e5"]
    assert found.lines["c"] == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2\n", "a.yaml:2: a: is there twice"),
        ("a: [1\n", "a.yaml:2: expected"),
        ("- 1\n", "holds no table"),
        ("a: !!python/object/apply:os.system [ls]\n", "a.yaml:1: could not determine a constructor"),
        ("1: 2\n", "a.yaml:1: the key 1 is not text"),
        ("", "holds no table"),
        ("a: \x07\n", "a.yaml"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text)
    assert said in caught.value.fact
