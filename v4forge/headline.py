"""The first table of the report: each published figure, and what was measured here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4forge import bench_rows, published
from v4forge.bench_rows import PUBLISHED_REPLICA, Standing, standing
from v4forge.shown import NOT_MEASURED, Cell, Table, columns, p_value

Json = Mapping[str, Any]
SURE = 0.05  # a two-sided p below it is called a difference


@dataclass(frozen=True)
class Found:
    """Ours of one published figure. `note` says under which other conditions."""

    value: float
    note: str = ""
    se: float | None = None
    against: str = ""  # the difference from the original, tested
    mark: str = ""


@dataclass(frozen=True)
class Pipeline:
    """What making the artifact took, where it is known; `flash` says whether it is Flash's."""

    flash: bool = False
    calibrate_s: float | None = None
    calibrated: str = ""
    postprocess_s: float | None = None
    bytes: int | None = None


def pipeline(run: Json, manifest: Json | None) -> Pipeline:
    """From run.json and manifest.json, {} or None where they are not there."""
    if manifest is None:
        return Pipeline()
    shards = [entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")]
    settings = manifest["calibration"].get("settings") or {}
    samples, length = settings.get("samples"), settings.get("seq_len")
    return Pipeline(
        flash=len(manifest["layers"]) == bench_rows.FLASH["num_hidden_layers"],
        calibrate_s=run["calibrate"]["elapsed_s"] if "calibrate" in run else None,
        calibrated=f"{samples} x {length} tokens" if samples and length else "",
        postprocess_s=run["postprocess"]["elapsed_s"] if "postprocess" in run else None,
        bytes=sum(shards),
    )


COMMANDS = {
    "speed": "make bench-speed",
    "draft": "make bench-draft",
    "quality": "make bench-quality",
    "tools": "make bench-tools",
    "pipeline": "make artifact",
}


def table(results: Mapping[str, Json], made: Pipeline) -> Table:
    """One row a published figure, in the file's order, under its conditions. results: of each bench its file."""
    standings = {bench: standing(result) for bench, result in results.items()}
    measured = {bench: _measured(bench, result) for bench, result in results.items()}
    measured["pipeline"] = _of_pipeline(made)
    rows: list[list[Cell]] = []
    conditions = ""
    for figure in published.figures():
        if figure.conditions != conditions:
            conditions = figure.conditions
            rows.append([Cell(figure.subject, f"published: {conditions}")])
        ours, against = _ours(figure, measured.get(figure.bench, {}), standings.get(figure.bench), made)
        rows.append([Cell(figure.title), ours, _original(figure), against, _siblings(figure)])
    return Table(
        "headline",
        "Ours beside what was published",
        columns("<", "ours", "published original", "difference", "<siblings"),
        rows,
        note=(
            "A difference is tested only where both sides have a standard error: ours minus the original in points, "
            "± its standard error, two-sided. Siblings are other artifacts or other machines."
        ),
    )


def measures_published(results: Mapping[str, Json], made: Pipeline) -> bool:
    """Whether any of it may stand beside the published figures."""
    return made.flash or any(standing(result).published_model for result in results.values())


def _ours(
    figure: published.Figure, measured: Mapping[str, Found], at: Standing | None, made: Pipeline
) -> tuple[Cell, Cell]:
    nothing = Cell("")
    if figure.bench == "pipeline":
        known, other = made.bytes is not None, "" if made.flash else "another model"
    else:
        known, other = at is not None, at.short if at and not at.published_model else ""
    if not known:
        return Cell(NOT_MEASURED, COMMANDS[figure.bench], "dim"), nothing
    if other:
        return Cell("not comparable", other, "dim"), nothing
    found = measured.get(figure.key)
    if found is None:
        return Cell(NOT_MEASURED, COMMANDS[figure.bench], "dim"), nothing
    trial = at.short if at and at.trial is not None else ""
    note = "; ".join(part for part in (trial, found.note) if part)
    return Cell(figure.shown(found.value, found.se), note), Cell(found.against, mark=found.mark)


def _original(figure: published.Figure) -> Cell:
    if figure.original is None:
        return Cell("–", mark="dim")
    value = figure.original
    counts = f"{value.counts[0]:,} of {value.counts[1]:,}" if value.counts else ""
    return Cell(figure.shown(value.value, value.se), "; ".join(part for part in (value.note, counts) if part))


def _siblings(figure: published.Figure) -> Cell:
    said = [f"{figure.shown(each.value, each.se)}, {each.who}" for each in figure.siblings]
    return Cell("; ".join(said))


def _measured(bench: str, result: Json) -> dict[str, Found]:
    readers = {"speed": _of_speed, "draft": _of_draft, "quality": _of_quality, "tools": _of_tools}
    return readers[bench](result)


def _of_speed(result: Json) -> dict[str, Found]:
    target = result["target"]
    deployed = {name: target.get(name) for name in PUBLISHED_REPLICA}
    note = ""
    if deployed != PUBLISHED_REPLICA:
        replicas, parallel = deployed["replicas"], deployed["tensor_parallel"]
        note = f"other conditions: {replicas or '?'} replicas of TP={parallel or '?'}"
    found = {}
    for row in bench_rows.speed_rows(result):
        at = f"k{row.drafts}/{row.shape}/c{row.concurrency}"
        found[f"speed/{at}/tpot_ms"] = Found(row.tpot_ms[0], note)
        found[f"speed/{at}/output_tok_s"] = Found(row.output_tok_s, note)
        if row.gain is not None:
            speedup = row.gain.tpot_speedup
            ends = "" if math.isnan(speedup.low) else f"{speedup.low:.2f} to {speedup.high:.2f}"
            said = "; ".join(part for part in (ends, note) if part)
            found[f"speedup/{at}/tpot_ms"] = Found(speedup.value, said)
    return found


def _of_draft(result: Json) -> dict[str, Found]:
    """Of the first draft: with k=1, as published, it is the only one."""
    found = {}
    for row in bench_rows.acceptance_rows(result):
        first = row.by_position[0] if row.by_position else row.acceptance
        if math.isnan(first.value):
            continue
        ends = "" if math.isnan(first.low) else f"{100 * first.low:.1f} to {100 * first.high:.1f}"
        found[f"draft/{row.workload}"] = Found(100 * first.value, ends)
    return found


def _of_quality(result: Json) -> dict[str, Found]:
    keys = {figure.title: figure.key for figure in published.figures() if figure.bench == "quality"}
    found = {}
    for row in bench_rows.quality_rows(result):
        if row.title not in keys:
            continue
        against = mark = ""
        if row.delta is not None and row.delta_se is not None and row.p is not None:
            against = f"{row.delta:+.2f} ±{row.delta_se:.2f}, {p_value(row.p)}"
            mark = ("bad" if row.delta < 0 else "good") if row.p < SURE else ""
        found[keys[row.title]] = Found(row.value, "; ".join(row.differs), row.se, against, mark)
    return found


def _of_tools(result: Json) -> dict[str, Found]:
    rows = bench_rows.conversations(result)
    found = {}
    if rows.tools:
        found["tools/total"] = Found(rows.score, "" if rows.most == 30 else f"of {rows.most}, not all were run")
    for row in rows.smoke:
        found[f"smoke/{row.group}"] = Found(row.passed, _partly(row.of, bench_rows.SMOKE_SIZES.get(row.group)))
    return found


def _partly(of: int, whole: int | None) -> str:
    return "" if whole in (None, of) else f"of {of}, not all were run"


def _of_pipeline(made: Pipeline) -> dict[str, Found]:
    found = {"pipeline/intermediate": Found(0, "none is written")}
    if made.calibrate_s is not None:
        found["pipeline/calibrate"] = Found(made.calibrate_s / 3600, made.calibrated)
    if made.postprocess_s is not None:
        found["pipeline/postprocess"] = Found(made.postprocess_s / 60)
    if made.bytes is not None:
        found["pipeline/bytes"] = Found(made.bytes / 1e9)
    return found
