"""The result files of the benches, read for people: what is not as expected is named with what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge.bench import measurement
from v4forge.errors import UserError
from v4forge.files import read


@dataclass(frozen=True)
class Bench:
    """`title`: what its part of the report is called; `command` makes its result."""

    title: str
    command: str


# In the order of the report.
BENCHES = {
    "speed": Bench("Speed by concurrency", "make bench-speed"),
    "draft": Bench("Drafts accepted by workload", "make bench-draft"),
    "quality": Bench("Quality", "make bench-quality"),
    "tools": Bench("Tool calls and conversations", "make bench-tools"),
}
# What every result file has, and of which kind.
HEAD: dict[str, type | tuple[type, ...]] = {
    "complete": bool,
    "target": Mapping,
    "machine": Mapping,
    "versions": Mapping,
    "settings": Mapping,
    "sampling": Mapping,
    "hashes": Mapping,
    "parts": Mapping,
    "failures": Mapping,
    "commands": list,
    "started": str,
}


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    content: dict[str, Any]

    @property
    def bench(self) -> str:
        return str(self.content["bench"])


def again(path: Path, bench: str) -> str:
    """What to do about a result file that cannot be used."""
    return f"move {path.name} out of the folder, then measure again: {BENCHES[bench].command}"


def load(path: Path) -> Result:
    """A bench's result file. Raises UserError when it is not one, or of another form."""
    content = read(path, "pass a result file of make bench, <bench>-<time>.json")
    bench = content.get("bench")
    if bench not in BENCHES:
        raise UserError(f"{path} is not the result of a bench", "pass a result file of make bench, <bench>-<time>.json")
    if content.get("form") != measurement.FORM:
        fact = f"{path} has form {content.get('form')!r}, and this version reads {measurement.FORM}"
        raise UserError(fact, again(path, bench))
    for key, kind in HEAD.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} has no {key!r}, or of another form", again(path, bench))
    for kind_of in ("parts", "failures"):
        if not all(isinstance(each, Mapping) for each in content[kind_of].values()):
            raise UserError(f"{path} has {kind_of} of another form", again(path, bench))
    return Result(path, content)


def newest(folder: Path) -> dict[str, Result]:
    """bench -> its result that counts (measurement.newest), of the benches that have one in `folder`.

    Raises UserError for a file that has such a name and cannot be read, rather than pass over what was measured.
    """
    found = {}
    for bench in BENCHES:
        there = [load(path) for path in measurement.files(folder, bench)]
        content = measurement.newest(folder, bench)
        chosen = next((each for each in there if each.content == content), None)
        if chosen:
            found[bench] = chosen
    return found
