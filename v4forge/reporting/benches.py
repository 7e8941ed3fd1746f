"""The benches that the report tells of, in its order, and what each says of its result file.

A bench is a module of six functions and one line of BENCHES.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from v4forge.bench.results import command_of, sums_of
from v4forge.bench.standing import Worth, worth_of
from v4forge.reporting import bench_drafts, bench_quality, bench_speed, bench_tools
from v4forge.reporting.tables import Cell, Drawing, Figure, Found, Json, Section, Table

SETTINGS_SHOWN = 200  # characters of a line of settings; the result file has them all


class Bench(Protocol):
    """`rows` are made of a result file's content, and all else is of them. TITLE: what the bench's part of the report
    is called; SAID heads its sentences."""

    TITLE: str
    SAID: str

    def rows(self, result: Json) -> Any: ...

    def tables(self, found: Any, worth: Worth) -> tuple[list[Table], list[str]]:
        """And sentences."""

    def overview(self, found: Any, worth: Worth) -> Cell:
        """The bench in the table that one look is for."""

    def published(self, found: Any) -> dict[str, Found]:
        """Ours by the key of each published figure."""

    def figures(self, found: Any) -> list[Figure]:
        """All of them, for programs."""

    def drawings(self, found: Any, worth: Worth) -> list[Drawing]:
        """With the published figures in them where those may stand beside ours."""


BENCHES: dict[str, Bench] = {
    "speed": bench_speed,
    "draft": bench_drafts,
    "quality": bench_quality,
    "tools": bench_tools,
}


@dataclass(frozen=True)
class Told:
    """What a bench says of one result file. Each part is made once, when it is first asked for; a key that the file
    lacks is a KeyError then."""

    name: str
    result: Json
    other: str = ""  # of which artifact it is, '' where of the one that is reported on

    @property
    def bench(self) -> Bench:
        return BENCHES[self.name]

    @cached_property
    def worth(self) -> Worth:
        return replace(worth_of(self.result), other=self.other)

    @cached_property
    def rows(self) -> Any:
        return self.bench.rows(self.result)

    @cached_property
    def overview(self) -> Cell:
        return self.bench.overview(self.rows, self.worth)

    @cached_property
    def published(self) -> dict[str, Found]:
        return self.bench.published(self.rows)

    @cached_property
    def section(self) -> Section:
        """Tables, sentences, and how it was measured; without the drawings."""
        tables, said = self.bench.tables(self.rows, self.worth)
        again = f"unfinished: the same command again goes on, {command_of(self.name)}"
        return Section(
            self.name,
            self.bench.TITLE,
            command_of(self.name),
            marks=[*self.worth.marks, *([] if self.worth.complete else [again])],
            said=said,
            said_title=self.bench.SAID,
            tables=[replace(table, title=self._marked(table.title)) for table in tables if table.rows],
            failures=[(key, each["fact"], each["hint"]) for key, each in self.result["failures"].items()],
            provenance=list(provenance(self.result)),
        )

    @cached_property
    def drawn(self) -> Section:
        """The section with its drawings."""
        drawings = self.bench.drawings(self.rows, self.worth)
        noted = [replace(d, note="; ".join(part for part in (self.worth.short, d.note) if part)) for d in drawings]
        return replace(self.section, drawings=noted)

    def make(self) -> None:
        """All of it at once, so that a file of another form is noticed here."""
        _ = self.drawn, self.overview, self.published, self.bench.figures(self.rows)

    def _marked(self, title: str) -> str:
        """A title that says so where its figures are no result."""
        return f"{title} ({self.worth.short})" if self.worth.short else title


def told(results: Mapping[str, Json], sums: str | None = None) -> dict[str, Told]:
    """results: of each bench its file's content; sums: the artifact that is reported on, where there is one."""
    return {name: Told(name, results[name], other_than(sums, results[name])) for name in BENCHES if name in results}


def other_than(sums: str | None, result: Json) -> str:
    """Of which artifact a result is, where it is of another one than `sums`; '' where it is of that, or there is none.

    sums: the digest of its SHA256SUMS.
    """
    whose = sums_of(result)
    if sums is None or whose == sums:
        return ""
    return f"another artifact, SHA256SUMS {str(whose)[:12]}…" if whose else "an artifact that nobody told"


def not_measured(name: str) -> Section:
    """The section of a bench that was not run: the command."""
    return Section(name, BENCHES[name].TITLE, command_of(name), measured=False)


def provenance(result: Json) -> Iterator[tuple[str, str]]:
    """(name, text): what was measured, where, by what, with which settings, when, by which commands."""
    target, machine = result["target"], result["machine"]
    artifact, image = target.get("artifact") or {}, target.get("image") or {}
    yield "model", f"{target.get('model')} at {target.get('url')}"
    if artifact:
        yield "artifact", f"{artifact.get('folder')}, certificate {artifact.get('certificate')}"
        yield "SHA256SUMS", str(artifact.get("sums_sha256") or "none")
    else:
        yield "artifact", "not known: the server does not tell, and no --artifact was given"
    if image:
        digests = image.get("digests") or []
        yield "image", ", ".join(str(part) for part in (image.get("reference"), image.get("id"), *digests) if part)
    served = {name: target.get(name) for name in ("backend", "profile", "replicas", "tensor_parallel", "drafts")}
    yield "served", _listed(served | {"max_model_len": target.get("max_model_len")} | (target.get("options") or {}))
    yield "machine", machine_line(machine)
    yield "versions", _listed(result["versions"])
    yield "settings", _listed(result["settings"])
    yield "sampling", _listed(result["sampling"])
    yield "seed", str(result.get("seed"))
    for name, digest in result["hashes"].items():
        yield f"sha256 of {name}", str(digest)
    yield "from, to", f"{result['started']}, {result.get('ended')}"
    for run, command in enumerate(result["commands"], start=1):
        yield "command" if run == 1 else f"command {run}", str(command)


def machine_line(machine: Json) -> str:
    """GPUs with their driver, processors, memory."""
    gpus = machine.get("gpus") or []
    names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    memory = f"{machine.get('memory_gib')} GiB"
    return f"{names}{driver}; {machine.get('cpus')} CPUs ({machine.get('cpu')}), {memory}"


def _listed(values: Json) -> str:
    """{"a": 1, "b": None} -> a=1; nested ones as JSON would have them, cut where they are long."""
    said = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None) or "none"
    return said if len(said) <= SETTINGS_SHOWN else f"{said[:SETTINGS_SHOWN]}… (all of it is in the result file)"
