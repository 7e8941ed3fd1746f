"""What a check found. A check is a function with a name that is run; what comes of one run is an outcome.

Verify, the doctor, the probe of replicas, the release check and the linters all speak of what they found so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from v4forge import hints

OK, WARNING, FAILED, NOT_CHECKED = "ok", "warning", "failed", "not checked"


@dataclass(frozen=True)
class Outcome:
    """`fact` says what was found in one line, `fix` is the one command that gets past it, "" where there is none.

    `after`: the check that says more, whose fix helps here too.
    """

    name: str
    status: str
    fact: str
    fix: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fix", hints.told(self.fix))

    @property
    def ok(self) -> bool:
        """Whether nothing keeps a run from going on."""
        return self.status != FAILED

    @property
    def detail(self) -> str:
        """The fact and what to do about it."""
        return f"{self.fact}: {self.fix}" if self.fix else self.fact

    def record(self) -> dict[str, str]:
        """The outcome as JSON."""
        return {"name": self.name, "status": self.status, "fact": self.fact, "fix": self.fix}


class NotChecked(Exception):
    """Raised by a check that has no object here, and what would give it one; `after`: the check that says why."""

    def __init__(self, fact: str, fix: str = "", after: str = "") -> None:
        self.fact = f"{fact}, see {after}" if after else fact
        super().__init__(self.fact, fix)
        self.fix = fix
        self.after = after


# A check's function need not know its name; who runs it does.


def ok(fact: str, name: str = "") -> Outcome:
    return Outcome(name, OK, fact)


def warning(fact: str, fix: str, name: str = "") -> Outcome:
    return Outcome(name, WARNING, fact, fix)


def failed(fact: str, fix: str = "", name: str = "") -> Outcome:
    return Outcome(name, FAILED, fact, fix)


def not_checked(why: NotChecked, name: str = "") -> Outcome:
    return Outcome(name, NOT_CHECKED, why.fact, why.fix, why.after)


def lines(outcomes: Sequence[Outcome]) -> list[str]:
    """A line an outcome."""
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    told = [(outcome.name, outcome.status, " ".join(outcome.detail.split())) for outcome in outcomes]
    return [f"{name:<{width}}  {status:<{len(NOT_CHECKED)}}  {detail}" for name, status, detail in told]
