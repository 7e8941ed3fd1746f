"""outcomes: what a check found, in the forms that people and programs read."""

from __future__ import annotations

from v4forge import outcomes
from v4forge.outcomes import FAILED, NOT_CHECKED, OK, WARNING, NotChecked, Outcome

FOUND = [
    outcomes.ok("fine", "a"),
    outcomes.warning("old", "renew it", "longer"),
    outcomes.failed("two\nlines", "make it", "c"),
    outcomes.not_checked(NotChecked("no docker here", "install it", "docker"), "d"),
]


def test_only_what_failed_is_not_ok() -> None:
    assert {outcome.status: outcome.ok for outcome in FOUND} == {
        OK: True,
        WARNING: True,
        FAILED: False,
        NOT_CHECKED: True,
    }


def test_every_outcome_is_a_line_with_its_fix() -> None:
    assert outcomes.lines(FOUND) == [
        "a       ok           fine",
        "longer  warning      old: renew it",
        "c       failed       two lines: make it",
        "d       not checked  no docker here, see docker: install it",
    ]
    assert outcomes.lines([]) == []


def test_json_has_four_fields_in_their_order() -> None:
    assert [list(outcome.record().items()) for outcome in FOUND[1::2]] == [
        [("name", "longer"), ("status", WARNING), ("fact", "old"), ("fix", "renew it")],
        [("name", "d"), ("status", NOT_CHECKED), ("fact", "no docker here, see docker"), ("fix", "install it")],
    ]


def test_what_was_not_checked_names_the_check_that_says_why() -> None:
    assert FOUND[-1] == Outcome("d", NOT_CHECKED, "no docker here, see docker", "install it", after="docker")
    assert NotChecked("no drafts").fact == "no drafts"
