"""The second table of the report: each published figure, and what was measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from v4forge.bench import published_figures
from v4forge.bench.results import command_of
from v4forge.bench.standing import FLASH, Worth
from v4forge.reporting.benches import Told
from v4forge.reporting.tables import NONE, NOT_MEASURED, NOTHING, Cell, Found, Json, Table, columns
from v4forge.units import GB

MAKING = "make artifact"  # measures what the pipeline takes


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
    text = manifest["calibration"].get("corpus") or {}
    samples, length = text.get("samples"), text.get("seq_len")
    return Pipeline(
        flash=len(manifest["layers"]) == FLASH["num_hidden_layers"],
        calibrate_s=run["calibrate"]["elapsed_s"] if "calibrate" in run else None,
        calibrated=f"{samples} x {length} tokens" if samples and length else "",
        postprocess_s=run["postprocess"]["elapsed_s"] if "postprocess" in run else None,
        bytes=sum(shards),
    )


def table(benches: Mapping[str, Told], made: Pipeline) -> Table:
    """One row a published figure, in the file's order, under its conditions."""
    worths = {name: told.worth for name, told in benches.items()}
    measured = {name: told.published for name, told in benches.items()} | {"pipeline": _of_pipeline(made)}
    rows: list[list[Cell]] = []
    conditions = ""
    for figure in published_figures.figures():
        if figure.conditions != conditions:
            conditions = figure.conditions
            rows.append([Cell(figure.subject, f"published: {conditions}")])
        ours, against = _ours(figure, measured.get(figure.bench, {}), worths.get(figure.bench), made)
        rows.append([Cell(figure.title), ours, _original(figure), against, _siblings(figure)])
    return Table(
        "headline",
        "Ours beside what was published",
        columns("<", "ours", "published original", "difference", "<siblings"),
        rows,
        note=(
            "A difference is ours minus the original, in percent of it or, where the figure is a share or a count, in "
            "points. Those with ± the standard error are tested, two-sided; of the others no noise was published. "
            "Siblings are other artifacts, machines or prompts. Published in: "
            f"{'; '.join(published_figures.pages())}."
        ),
    )


def measures_published(benches: Mapping[str, Told], made: Pipeline) -> bool:
    """Whether any of it may stand beside the published figures."""
    return made.flash or any(told.worth.published_model for told in benches.values())


def _ours(
    figure: published_figures.Figure, measured: Mapping[str, Found], at: Worth | None, made: Pipeline
) -> tuple[Cell, Cell]:
    """Ours, and its difference from the original."""
    if figure.bench == "pipeline":
        known, other, command = made.bytes is not None, "" if made.flash else "another model", MAKING
    else:
        other = at.short if at and not at.published_model else ""
        known, command = at is not None, command_of(figure.bench)
    if known and other:
        return Cell("not comparable", other, "dim"), NOTHING
    found = measured.get(figure.key)
    if not known or found is None:
        return Cell(NOT_MEASURED, command, "dim"), NOTHING
    trial = at.short if at and at.trial is not None else ""
    note = "; ".join(part for part in (trial, found.note) if part)
    against = NOTHING if trial else found.against or _subtracted(figure, found.value)
    return Cell(figure.shown(found.value, found.se), note), against


def _subtracted(figure: published_figures.Figure, value: float) -> Cell:
    """Ours minus the original, of which nobody can say whether it is noise."""
    if figure.original is None:
        return NOTHING
    delta = value - figure.original.value
    if not delta:
        return Cell("0", mark="dim")
    if figure.is_share:
        return Cell(f"{delta:+.{figure.digits}f}", mark="dim")
    return Cell(f"{100 * delta / figure.original.value:+.1f}%", mark="dim")


def _original(figure: published_figures.Figure) -> Cell:
    if figure.original is None:
        return NONE
    value = figure.original
    counts = f"{value.counts[0]:,} of {value.counts[1]:,}" if value.counts else ""
    note = "; ".join(part for part in (value.note, counts) if part)
    return Cell(figure.shown(value.value, value.se), note, tip=value.source)


def _siblings(figure: published_figures.Figure) -> Cell:
    said = [f"{figure.shown(each.value, each.se)}, {each.who}" for each in figure.siblings]
    return Cell("; ".join(said), tip="; ".join(each.source for each in figure.siblings))


def _of_pipeline(made: Pipeline) -> dict[str, Found]:
    """Times are of other machines than the published ones, so that nothing is subtracted."""
    found = {"pipeline/intermediate": Found(0, "none is written", against=NOTHING)}
    if made.calibrate_s is not None:
        found["pipeline/calibrate"] = Found(made.calibrate_s / 3600, made.calibrated, against=NOTHING)
    if made.postprocess_s is not None:
        found["pipeline/postprocess"] = Found(made.postprocess_s / 60, against=NOTHING)
    if made.bytes is not None:
        found["pipeline/bytes"] = Found(made.bytes / GB)
    return found
