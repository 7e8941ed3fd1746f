"""Rules and forms of values: what holds, what does not, and what is told of it."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from v4forge.bench.tools import call_assertions, strict_yaml, value_matchers
from v4forge.bench.tools.call_assertions import AnyRule, Call, Run
from v4forge.bench.tools.strict_yaml import Model, OnlyTrue, Table
from v4forge.errors import UserError

TOOLS = ("read", "write")


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
    assert holds(dict(number=wanted, within=within), value) == (abs(value - wanted) <= within)


def test_a_whole_number_beyond_every_float_is_near_no_number() -> None:
    assert not holds(dict(number=17.8, within=0.1), 10**400)


DAYS = st.dates(date(1990, 1, 1), date(2090, 1, 1))
FORMS = ["%Y-%m-%d", "%d.%m.%Y", "%d %B %Y", "%B %d, %Y", "%A, %d %B %Y", "%Y-%m-%dT14:15:00", "%d %b %Y", "%Y/%m/%d"]


@given(DAYS, st.sampled_from(FORMS))
def test_a_day_is_known_in_every_usual_form(day: date, form: str) -> None:
    assert value_matchers.date_of(day.strftime(form)) == day
    assert not holds(dict(date=str(day + timedelta(days=1))), day.strftime(form))


@given(st.integers(0, 23), st.integers(0, 59))
def test_a_time_is_known_with_24_hours_and_with_12(hour: int, minute: int) -> None:
    wanted = hour * 60 + minute
    half = "pm" if hour >= 12 else "am"
    for text in (f"{hour:02}:{minute:02}", f"{hour}:{minute:02}:00", f"{hour % 12 or 12}:{minute:02} {half}"):
        assert value_matchers.minute_of(text) == wanted, text


@given(JSON)
def test_no_value_upsets_a_form(value: Any) -> None:
    for form in (
        dict(one_of=["a"]),
        dict(text="a"),
        dict(regex="a"),
        dict(number=1, within=1),
        dict(date="2027-03-17"),
        dict(time="14:15"),
        dict(unless_absent=False),
    ):
        assert holds(form, value) in (True, False)


def test_words_are_the_same_whatever_signs_are_between() -> None:
    assert holds(dict(text="Kiln #2 — don't!"), "kiln #2 - DON’T")
    assert not holds(dict(text="Kiln #2"), "Kiln #3")


def rule(**fields: Any) -> call_assertions.Rule:
    return TypeAdapter(AnyRule).validate_python(fields, context=TOOLS)


READ = Call(1, "read", {"room": "a"})
WRITTEN = Call(2, "write", {"room": "a"}, changed=True)
REFUSED = Call(2, "write", {"room": "a"}, failed=True)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [([READ, WRITTEN], True), ([WRITTEN], True), ([READ], False), ([REFUSED], False), ([WRITTEN, WRITTEN], False)],
)
def test_changes_are_those_that_succeeded_and_no_others(calls: list[Call], expected: bool) -> None:
    wanted = rule(changes=[dict(tool="write", arguments=dict(room="a"))])
    assert wanted.judge(Run("", calls))[0] is expected


def test_an_order_asks_for_later_turns() -> None:
    wanted = rule(order=[dict(tool="read"), dict(tool="write")])
    assert wanted.judge(Run("", [READ, WRITTEN]))[0]
    assert wanted.judge(Run("", [READ, Call(1, "write")])) == (False, "write came too early")
    assert not wanted.judge(Run("", [READ, REFUSED]))[0]


def test_a_failed_rule_says_what_came_closest() -> None:
    wanted = rule(calls=dict(tool="read", arguments=dict(room="b", floor=1)))
    near = Call(1, "read", {"room": "b", "floor": 2})
    assert wanted.judge(Run("", [READ, near]))[1] == 'read({"room": "b", "floor": 2}): floor otherwise'


def test_a_call_that_is_not_well_formed_fits_no_rule_but_counts() -> None:
    broken = Call(1, "read", {"room": "a"}, fault="arguments: …", failed=True)
    run = Run("", [broken])
    assert not rule(calls=dict(tool="read")).judge(run)[0]
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


class Row(Model):
    id: str
    least: int
    most: int = 9
    fits: OnlyTrue = True


class File(Model):
    rows: list[Row]


def test_all_faults_of_a_file_are_told_a_line_each_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "rows:\n  - {id: a, least: one,\n     most: 2.5}\n  - id: b\n  - least: no\n    lest: 1\n    id: c\n"
    )
    with pytest.raises(UserError) as caught:
        strict_yaml.read(path, File)
    assert caught.value.fact.splitlines() == [
        f"{path}:2: a: least: 'one' is not a whole number",
        f"{path}:3: a: most: 2.5 is not a whole number",
        f"{path}:4: b: least: is missing",
        f"{path}:6: c: lest: is not known here; known: id, least, most, fits",
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{id: a, least: true}", "a: least: True is not a whole number"),
        ("{id: a, least: '1'}", "a: least: '1' is not a whole number"),
        ("{id: 7, least: 1}", "7: id: 7 is not text"),
        ("{id: a, least: 1, fits: false}", "a: fits: can only be true"),
        ("{id: a, least: 1, fits: 1}", "a: fits: 1 is not true or false"),
        ("[1]", "rows: [1] is not a table"),
    ],
)
def test_no_value_is_taken_for_one_of_another_type(tmp_path: Path, row: str, said: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"rows: [{row}]\n")
    with pytest.raises(UserError) as caught:
        strict_yaml.read(path, File)
    assert caught.value.fact == f"{path}:1: {said}"
