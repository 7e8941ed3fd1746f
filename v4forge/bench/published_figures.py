"""Published figures with their conditions, from data/published.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "data" / "published.toml"


@dataclass(frozen=True)
class Value:
    """What somebody published, in the figure's unit. `who` names a sibling and its machine, '' the original."""

    who: str
    value: float
    se: float | None
    counts: tuple[int, int] | None  # hits and trials
    note: str
    source: str  # the page, and where on it


@dataclass(frozen=True)
class Figure:
    """One published figure; `key` says which measurement of ours it is comparable with in kind."""

    key: str
    title: str
    unit: str
    digits: int
    subject: str  # what a table calls the figures of these conditions
    conditions: str
    original: Value | None
    siblings: tuple[Value, ...]

    @property
    def bench(self) -> str:
        """What measures ours: speed, draft, quality, tools or pipeline."""
        return {"speedup": "speed", "smoke": "tools"}.get(head := self.key.partition("/")[0], head)

    @property
    def is_share(self) -> bool:
        """Whether it is percent of something, or a count of so many."""
        return self.unit == "%" or self.unit.startswith("of ")

    def shown(self, value: float, se: float | None = None) -> str:
        """A value of this figure with its unit, and ± its standard error; a whole number as what it is."""
        error = "" if se is None else f" ±{se:.2f}"
        digits = 0 if isinstance(value, int) else self.digits
        return f"{value:,.{digits}f}{'' if self.unit in ('%', 'x') else ' '}{self.unit}{error}"


@lru_cache(maxsize=1)
def figures() -> tuple[Figure, ...]:
    """All of them, in the order of the file."""
    data = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return tuple(_figure(entry, data) for entry in data["figure"])


@lru_cache(maxsize=1)
def by_key() -> dict[str, Figure]:
    """key -> figure."""
    return {figure.key: figure for figure in figures()}


def pages() -> list[str]:
    """Where the figures are from."""
    sources = tomllib.loads(FILE.read_text(encoding="utf-8"))["sources"]
    return [str(page) for page in sources.values()]


def _figure(entry: dict[str, Any], data: dict[str, Any]) -> Figure:
    original = entry.get("original")
    return Figure(
        key=entry["key"],
        title=entry["title"],
        unit=entry["unit"],
        digits=entry["digits"],
        subject=data["subjects"][entry["conditions"]],
        conditions=data["conditions"][entry["conditions"]],
        original=_value(original, data) if original else None,
        siblings=tuple(_value(each, data) for each in entry.get("siblings", ())),
    )


def _value(entry: dict[str, Any], data: dict[str, Any]) -> Value:
    return Value(
        who=entry.get("name", ""),
        value=entry["value"],
        se=entry.get("se"),
        counts=tuple(entry["counts"]) if "counts" in entry else None,
        note=entry.get("note", ""),
        source=f"{data['sources'][entry['source']]}: {entry['where']}",
    )
