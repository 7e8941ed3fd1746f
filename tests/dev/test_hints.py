"""dev.hints: every command that a message of the project's names is there and would be understood."""

from __future__ import annotations

import pytest

from dev import hints
from v4forge import checkout
from v4forge.checkout import ROOT

FOLDERS = ("v4forge/", "scripts/", "dev/", "docker/", "patches/")
SOURCES = [name for name in checkout.names() if name.endswith(".py") and name.startswith(FOLDERS)]
# Patterns for commands, which are none themselves.
PATTERNS = ("dev/doc_commands.py", "dev/hints.py")


def test_every_command_in_the_source_is_there_and_is_understood() -> None:
    found = [
        f"{name}:{line}: {fault}"
        for name in SOURCES
        if name not in PATTERNS
        for line, text in hints.texts((ROOT / name).read_text(encoding="utf-8"))
        for fault in hints.faults(text)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("make nonsense", "there is no target nonsense"),
        ("first make fetch, then: make sevre PORT=1", "there is no target sevre"),
        ("make serve GPU=3", "make serve does not read GPU"),
        ("or make … FOO=3", "does not read FOO"),
        ("make images IMAGE=calib && make card REGISTRY=x", "make card does not read REGISTRY"),
        ("make serve PORT=http.", "PORT=http is no number"),
        ("python -m scripts.nope x", "there is no program scripts.nope"),
        ("python -m scripts.verify --artifacts … says it", "verify has no option --artifacts"),
        ("python -m scripts.verify", ""),
        ("python -m scripts.verify --deep 8192 makes it", "the following arguments are required: --artifact"),
        ("v4forge calibrate --engine nonsense --source a --work b", "--engine"),
        ("make sure of it; make serve PORT=<another one>, or make fetch‹› ‹›=3 shows it", ""),
        ("python -m scripts.verify --artifact DIR --deep ‹› says what it lacks", ""),
        ("python -m scripts.certified check DIR --key", "--key"),
        ("python -m scripts.bench speed --help", ""),
    ],
)
def test_what_is_not_there_is_found(text: str, fault: str) -> None:
    found = hints.faults(text)
    assert [fault in each for each in found] == ([True] if fault else []), found
