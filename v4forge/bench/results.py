"""A bench's result file: what was measured on what, kept after every part, so that a run that ends goes on later; and
which of a folder's files counts.

`<bench>-<UTC>.json` in the folder of reports. `parts` holds the results by key; `failures` what could not be measured,
with the fact and the hint; everything else says what the figures belong to. A file is continued by a run whose target,
machine, versions, settings, prompts and seed are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from v4forge.errors import UserError
from v4forge.files import read, read_json, write_json

FORM = 1
BASELINE = "baseline"  # the folder in reports of what was measured beside them
NAME = re.compile(r"(?P<bench>[a-z]+)-\d{8}T\d{6}Z\.json")
# Failures in a row after which no server is there to answer the next part.
GIVE_UP = 3
# What makes two runs parts of one measurement; of the target, where it listens does not.
IDENTITY = ("target", "machine", "versions", "settings", "sampling", "seed", "hashes", "trial")
PLACES = {"target": ("url",), "versions": ("v4forge",)}

Json = Mapping[str, Any]

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


@dataclass
class Measurement:
    """One open result file."""

    path: Path
    content: dict[str, Any]

    def part(self, key: str) -> Json | None:
        """A part that was measured already."""
        found: Json | None = self.content["parts"].get(key)
        return found

    def keep(self, key: str, result: Json) -> None:
        """Adds a part, or replaces it, and writes the file."""
        self.content["parts"][key] = dict(result)
        self.content["failures"].pop(key, None)
        self._write()

    def fail(self, key: str, error: UserError) -> None:
        """Notes why a part could not be measured, and writes the file."""
        self.content["failures"][key] = {"fact": error.fact, "hint": error.hint}
        self._write()

    def finish(self) -> bool:
        """Writes the file as complete, unless something failed; whether it is."""
        self.content["complete"] = not self.content["failures"]
        self._write()
        return bool(self.content["complete"])

    def _write(self) -> None:
        self.content["ended"] = now()
        write_json(self.path, self.content)


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def begin(
    folder: Path, bench: str, facts: Json, trial: int | None = None, fresh: bool = False, command: str = ""
) -> Measurement:
    """The measurement to add to: the newest unfinished one of these facts, with its failures forgotten, else a new one.

    facts: target, machine, versions, settings, sampling, seed, hashes. trial: the --limit of a run that only tries the
    bench out, None for a whole one. fresh: always a new one. Raises UserError where the folder cannot be written.
    """
    content: dict[str, Any] = {"bench": bench, "form": FORM, "trial": trial, **json.loads(json.dumps(facts))}
    if not fresh:
        for path in reversed(files(folder, bench)):
            earlier = read_json(path)
            if earlier.get("complete") is False and identity(earlier) == identity(content):
                commands = [*earlier["commands"], command]
                versions = content["versions"] | {"v4forge": _both(earlier, content)}
                measurement = Measurement(path, {**earlier, "failures": {}, "commands": commands, "versions": versions})
                measurement._write()
                return measurement
    started = now()
    stamp = re.sub(r"[-:]|\+00:00", "", started) + "Z"
    path = folder / f"{bench}-{stamp}.json"
    if path.exists():
        raise UserError(f"{path} was begun this very second", "run it again")
    new = {"complete": False, "started": started, "commands": [command], "parts": {}, "failures": {}}
    measurement = Measurement(path, content | new)
    measurement._write()
    return measurement


def identity(content: Json) -> dict[str, Any]:
    """What has to be equal in runs whose parts belong together."""
    found = {}
    for name in IDENTITY:
        value = content.get(name)
        if isinstance(value, Mapping):
            value = {key: each for key, each in value.items() if key not in PLACES.get(name, ())}
        found[name] = value
    return found


def _both(earlier: Json, later: Json) -> str | None:
    """The commits that measured, in the order in which they did."""
    found = [each["versions"].get("v4forge") for each in (earlier, later)]
    return ", ".join(dict.fromkeys(name for each in found if each for name in each.split(", "))) or None


def measured(
    measurement: Measurement,
    keys: Sequence[str],
    one: Callable[[str], Json],
    progress: Callable[[int, str], None] = lambda _finished, _doing: None,
) -> None:
    """Measures the parts that are not there yet, by `one`; one that fails is noted, and the next one follows.

    Raises the UserError of the last of GIVE_UP parts that failed in a row.
    """
    in_a_row = 0
    for number, key in enumerate(keys):
        progress(number, key)
        if measurement.part(key) is not None:
            continue
        begun = now()
        try:
            result = one(key)
        except UserError as error:
            measurement.fail(key, error)
            in_a_row += 1
            if in_a_row == GIVE_UP:
                raise
            continue
        in_a_row = 0
        measurement.keep(key, {**result, "started": begun, "ended": now()})
    progress(len(keys), "done")


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    content: dict[str, Any]

    @property
    def bench(self) -> str:
        return str(self.content["bench"])

    @property
    def sums(self) -> str | None:
        return sums_of(self.content)


def sums_of(content: Json) -> str | None:
    """The digest of the SHA256SUMS of the artifact that a result is of, where it is known."""
    artifact = content["target"].get("artifact")
    found: str | None = artifact.get("sums_sha256") if isinstance(artifact, Mapping) else None
    return found


def command_of(bench: str) -> str:
    """What makes a bench's result."""
    return f"make bench-{bench}"


def again(path: Path, bench: str) -> str:
    """What to do about a result file that cannot be used."""
    return f"move {path.name} out of the folder, then measure again: {command_of(bench)}"


def load(path: Path, benches: Collection[str]) -> Result:
    """A result file of one of these benches. Raises UserError when it is not one, or of another form."""
    content = read(path, "pass a result file of make bench, <bench>-<time>.json")
    bench = content.get("bench")
    if not isinstance(bench, str) or bench not in benches:
        raise UserError(f"{path} is not the result of a bench", "pass a result file of make bench, <bench>-<time>.json")
    if content.get("form") != FORM:
        fact = f"{path} has form {content.get('form')!r}, and this version reads {FORM}"
        raise UserError(fact, again(path, bench))
    for key, kind in HEAD.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} has no {key!r}, or of another form", again(path, bench))
    for kind_of in ("parts", "failures"):
        if not all(isinstance(each, Mapping) for each in content[kind_of].values()):
            raise UserError(f"{path} has {kind_of} of another form", again(path, bench))
    return Result(path, content)


def files(folder: Path, bench: str) -> list[Path]:
    """The result files of a bench, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if (found := NAME.fullmatch(path.name)) and found["bench"] == bench)


def newest(folder: Path, benches: Collection[str], sums: str | None = None) -> dict[str, Result]:
    """bench -> its result that counts, of those of these benches that have one in `folder`: the newest of whole
    measurements, then of unfinished ones, then of trials, and only then of those without a part. sums: the SHA256SUMS
    of the artifact that is asked about, whose results come before any of others.

    Raises UserError for a file that has such a name and cannot be read, rather than pass over what was measured.
    """
    found = {}
    for bench in benches:
        there = [each for path in files(folder, bench) if (each := load(path, benches)).bench == bench]
        if there:
            found[bench] = max(there, key=lambda each: (sums is not None and each.sums == sums, *_worth(each)))
    return found


def _worth(result: Result) -> tuple[bool, bool, bool, str]:
    whole = result.content.get("trial") is None, result.content["complete"] is True
    return bool(result.content["parts"]), *whole, str(result.content["started"])
