"""versions.env's form. That everything else agrees with it: test_lock_check.py."""

from __future__ import annotations

import re

import pytest

from v4forge import pins
from v4forge.errors import UserError


def test_comments_and_blank_lines_are_skipped_and_empty_values_kept() -> None:
    assert pins.parse("# a comment\n\nA_VERSION=1.2\nB=\n", "x") == {"A_VERSION": "1.2", "B": ""}


@pytest.mark.parametrize("line", ["no value", "a=lower case key", "A = 1", "A=1 # trailing", "=1"])
def test_a_line_that_is_not_key_value_is_named(line: str) -> None:
    with pytest.raises(UserError, match=re.escape("versions.env:2")):
        pins.parse(f"# first\n{line}\n", "versions.env")


def test_a_key_set_twice_is_named() -> None:
    with pytest.raises(UserError, match=r"versions\.env:2 sets A a second time"):
        pins.parse("A=1\nA=2\n", "versions.env")
