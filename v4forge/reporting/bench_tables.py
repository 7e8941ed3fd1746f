"""What each bench says, as a section of tables and sentences; drawings come from v4forge/reporting/figures.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from v4forge.bench import bench_rows
from v4forge.bench.bench_rows import UNKNOWN, AcceptanceRow, Offline, QualityRow, standing
from v4forge.bench.results import BENCHES
from v4forge.bench.speed import NO, YES
from v4forge.bench.statistics import SURE
from v4forge.intervals import Estimate
from v4forge.reporting.tables import NONE, Cell, Section, Table, columns, ends, number, p_value, percent, points

Json = Mapping[str, Any]
SAID = {"speed": "Where drafts stop paying, by tokens a second", "tools": "What was lost"}
SETTINGS_SHOWN = 200  # characters of a line of settings; the result file has them all


def section(bench: str, result: Json | None) -> Section:
    """The section of a bench; of one that was not measured only the command."""
    title, command = BENCHES[bench].title, BENCHES[bench].command
    if result is None:
        return Section(bench, title, command, measured=False)
    readers: dict[str, Callable[[], tuple[list[Table], list[str]]]] = {
        "speed": lambda: _speed(result),
        "draft": lambda: _draft(bench_rows.acceptance_rows(result), bench_rows.offline(result)),
        "quality": lambda: _quality(bench_rows.quality_rows(result), standing(result).comparable),
        "tools": lambda: _tools(bench_rows.conversations(result)),
    }
    tables, said = readers[bench]()
    worth = standing(result)
    unfinished = [] if worth.complete else [f"unfinished: the same command again goes on, {command}"]
    return Section(
        bench,
        title,
        command,
        marks=[*worth.marks, *unfinished],
        said=said,
        said_title=SAID.get(bench, ""),
        tables=[replace(table, title=marked(table.title, result)) for table in tables if table.rows],
        failures=[(key, each["fact"], each["hint"]) for key, each in result["failures"].items()],
        provenance=list(provenance(result)),
    )


def marked(title: str, result: Json) -> str:
    """A title that says so where its figures are no result."""
    short = standing(result).short
    return f"{title} ({short})" if short else title


def _speed(result: Json) -> tuple[list[Table], list[str]]:
    rows, drift = bench_rows.speed_rows(result), bench_rows.drift(result)
    found: list[list[Cell]] = []
    for row in rows:
        heading = Cell(row.shape.replace("x", " tokens in, ") + " out")
        if [heading] not in found:
            found.append([heading])
        line = [
            Cell(f"{row.concurrency} at once"),
            Cell(f"k={row.drafts}" if row.drafts else "none"),
            Cell(f"{row.tpot_ms[0]:,.2f}", f"p99 {row.tpot_ms[1]:,.2f}"),
            Cell(f"{row.ttft_ms[0]:,.0f}", f"p99 {row.ttft_ms[1]:,.0f}"),
            number(row.output_tok_s, 1),
            number(row.goodput_request_s),
            _gain(row.gain.tpot_speedup, row.gain.faster) if row.gain else NONE,
            _gain(row.gain.throughput_ratio, row.gain.pays) if row.gain else NONE,
            number(None if row.acceptance is None else 100 * row.acceptance, 1, "%"),
        ]
        found.append(line)
    limits = sorted({(f"{row.slo['ttft_ms']:g}", f"{row.slo['tpot_ms']:g}") for row in rows if row.slo})
    within = " or ".join(f"{first} ms to the first token and {each} ms for each further one" for first, each in limits)
    note = (
        "Median and 99th percentile of requests. Gains are against no drafts at the same shape and concurrency; above "
        "1x drafts are better. Green and red are beyond noise: the 95% interval, widened by the servers' drift."
    )
    if within:
        note += f" Goodput counts requests within {within}."
    note += f" {drift}" if drift else ""
    titles = ("<requests", "drafts", "ms a token", "ms to first", "tok/s", "goodput, req/s")
    against = ("time a token, against none", "tok/s, against none", "accepted")
    return [Table("speed", "All points", columns(*titles, *against), found, note)], bench_rows.stops_paying(result)


def _gain(ratio: Estimate, beyond: str) -> Cell:
    """beyond: yes, no, or unclear, whether it is above 1 beyond noise."""
    return Cell(f"{ratio.value:.2f}x", ends(ratio, ".2f"), {YES: "good", NO: "bad"}.get(beyond, ""))


def _draft(rows: Sequence[AcceptanceRow], offline: Offline | None) -> tuple[list[Table], list[str]]:
    places = [f"draft {position}" for position in range(1, _longest(rows) + 1)]
    overall, given = [], []
    for row in rows:
        counts = Cell(f"{row.accepted:,}", f"of {row.draft_tokens:,}")
        line = [Cell(row.title), number(row.prompts, 0), counts, percent(row.acceptance)]
        if offline:
            line.append(points(offline.differences.get(row.workload, UNKNOWN)))
        overall.append([*line, *map(percent, _filled(row.by_position, len(places)))])
        given.append([Cell(row.title), *map(percent, _filled(row.given_earlier, len(places)))])
    if offline:
        blank = Cell("")
        held = [Cell("offline", "verify --deep"), blank, blank, percent(offline.acceptance), blank]
        overall.append([*held, *[blank] * len(places)])
        given.append([Cell("offline", "verify --deep"), *map(percent, _filled(offline.given_earlier, len(places)))])
        said = [f"Offline: {offline.about}."]
    else:
        said = ["No offline figure of this artifact: python -m scripts.verify --deep 8192 makes it."]
    against = ["against offline, points"] if offline else []
    return [
        Table(
            "draft",
            "Accepted, of all drafts proposed",
            columns("<", "prompts", "accepted", "together", *against, *places),
            overall,
            note="With 95% intervals (Wilson's). Draft i counts as accepted only with all before it.",
        ),
        Table(
            "draft-given",
            "Accepted, where all earlier drafts were",
            columns("<", *places),
            given if len(places) > 1 or offline else [],
        ),
    ], said


def _longest(rows: Sequence[AcceptanceRow]) -> int:
    return max((len(row.by_position) for row in rows), default=0)


def _filled(values: Sequence[Estimate], length: int) -> list[Estimate]:
    return [*values[:length], *[UNKNOWN] * (length - len(values))]


def _quality(rows: Sequence[QualityRow], comparable: bool) -> tuple[list[Table], list[str]]:
    found = []
    for row in rows:
        error = "" if row.se is None else f" ±{row.se:.2f}"
        line = [
            Cell(row.title, "" if row.metric in row.title else row.metric),
            Cell(f"{row.questions:,}", f"{row.invalid} without an answer" if row.invalid else ""),
            Cell(f"{row.value:.2f}{error}", "; ".join(row.differs)),
        ]
        original = row.figure.original if row.figure else None
        if original is None:
            line += [NONE, Cell("")]
        elif not comparable:
            line += [Cell("not comparable", mark="dim"), Cell("")]
        else:
            line.append(Cell(f"{original.value:.2f}" + (f" ±{original.se:.2f}" if original.se else "")))
            line.append(difference(row))
        found.append(line)
    heads = columns("<task", "questions", "ours, %", "published, %", "difference, points")
    note = (
        "± is the standard error. The difference is tested two-sided: p is how often chance alone makes one as large."
    )
    sure = [row for row in rows if row.p is not None and row.p < SURE]
    tested = sum(row.p is not None for row in rows)
    said = []
    if tested:
        names = ", ".join(f"{row.title} ({row.delta:+.2f})" for row in sure) or "none"
        said.append(
            f"Beyond noise at 5%: {names}, of {tested} tested; chance alone makes {SURE * tested:.1f} of them so."
        )
    return [Table("quality", "Tasks of lm-eval", heads, found, note if tested else "± is the standard error.")], said


def difference(row: QualityRow) -> Cell:
    """Ours minus the published in points, ± its standard error, with p; green or red beyond noise."""
    if row.delta is None or row.delta_se is None or row.p is None:
        return Cell("not tested", "no standard error", "dim")
    mark = ("bad" if row.delta < 0 else "good") if row.p < SURE else ""
    return Cell(f"{row.delta:+.2f} ±{row.delta_se:.2f}", p_value(row.p), mark)


def _tools(rows: bench_rows.Conversations) -> tuple[list[Table], list[str]]:
    calls = [
        [
            Cell(row.category),
            Cell(" ".join(f"{score}" for _, score, _ in row.scenarios)),
            Cell(f"{row.score}/{row.most}"),
        ]
        for row in rows.tools
    ]
    if calls:
        calls.append([Cell("together"), Cell(""), Cell(f"{rows.score}/{rows.most}")])
    smoke = [[Cell(row.group), Cell(f"{row.passed}/{row.of}")] for row in rows.smoke]
    said = [reason for category in rows.tools for reason in category.reasons]
    said += [reason for group in rows.smoke for reason in group.reasons]
    note = "Points of each scenario: 2 pass, 1 partly, 0 fail. Traces are in the result file."
    return [
        Table("tools", "Tool calls", columns("<category", "scenarios", "points"), calls, note),
        Table("smoke", "Conversations with known outcomes", columns("<group", "passed"), smoke),
    ], said


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
    gpus = machine.get("gpus") or []
    names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    memory = f"{machine.get('memory_gib')} GiB"
    yield "machine", f"{names}{driver}; {machine.get('cpus')} CPUs ({machine.get('cpu')}), {memory}"
    yield "versions", _listed(result["versions"])
    yield "settings", _listed(result["settings"])
    yield "sampling", _listed(result["sampling"])
    yield "seed", str(result.get("seed"))
    for name, digest in result["hashes"].items():
        yield f"sha256 of {name}", str(digest)
    yield "from, to", f"{result['started']}, {result.get('ended')}"
    for run, command in enumerate(result["commands"], start=1):
        yield "command" if run == 1 else f"command {run}", str(command)


def _listed(values: Json) -> str:
    """{"a": 1, "b": None} -> a=1; nested ones as JSON would have them, cut where they are long."""
    said = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None) or "none"
    return said if len(said) <= SETTINGS_SHOWN else f"{said[:SETTINGS_SHOWN]}… (all of it is in the result file)"
