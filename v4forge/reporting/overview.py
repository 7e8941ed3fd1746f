"""The first table of the report: a line for each thing that there is to know, so that one look says whether to use the
artifact. What was not measured is a line too, with the command that measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from v4forge import artifact_folder
from v4forge.bench import bench_rows
from v4forge.bench.bench_rows import SpeedRow, standing
from v4forge.bench.results import BENCHES
from v4forge.bench.statistics import SURE
from v4forge.quantization.layer_reports import Json, layer_rows
from v4forge.reporting import run_sections
from v4forge.reporting.tables import NOT_MEASURED, Cell, Table, columns


@dataclass(frozen=True)
class Inputs:
    """What there is to report on; what was not made yet is None or empty."""

    evaluation: Json | None = None
    certificate: Json | None = None
    layers: Sequence[Json] = ()
    run: Json = field(default_factory=dict)
    manifest: Json | None = None
    results: Mapping[str, Json] = field(default_factory=dict)  # of the benches


# Of what is no bench: what a line calls it, and what makes it.
STAGES = {
    "manifest": ("Artifact", "make postprocess"),
    "certificate": ("Certificate", "make verify"),
    "evaluation": ("Perplexity of held-out text", "make demo"),
    "layers": ("Losses by layer", "make calibrate"),
}


def table(inputs: Inputs) -> Table:
    """The stages' lines, then the benches'."""
    stages: dict[str, Callable[[Json], Cell]] = {
        "manifest": _artifact,
        "certificate": _certificate,
        "evaluation": _perplexity,
    }
    rows = []
    for name, (title, command) in STAGES.items():
        if name == "layers":
            said = _losses(inputs.layers) if inputs.layers else None
        else:
            content = getattr(inputs, name)
            said = stages[name](content) if content is not None else None
        rows.append([Cell(title), said or Cell(NOT_MEASURED, command, "dim")])
    benches = {"speed": _speed, "draft": _draft, "quality": _quality, "tools": _tools}
    for name, bench in BENCHES.items():
        result = inputs.results.get(name)
        if result is None:
            rows.append([Cell(bench.title), Cell(NOT_MEASURED, bench.command, "dim")])
        else:
            worth = standing(result)
            marks = [mark for mark in (worth.short, "" if worth.complete else "unfinished") if mark]
            rows.append([Cell(bench.title, "; ".join(marks)), benches[name](result)])
    return Table("glance", "At a glance", columns("<", "<"), rows)


def _artifact(manifest: Json) -> Cell:
    shards = [entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")]
    total = sum(shards)
    size = f"{total / 1e9:,.1f} GB" if total >= 1e9 else f"{total / 1e6:,.1f} MB"
    return Cell(f"{size} in {len(shards)} shard{'s' * (len(shards) != 1)}", _recipe(manifest))


def _recipe(manifest: Json) -> str:
    """What is in another form than upstream's."""
    rules = (manifest.get("recipe") or {}).get("rules") or ()
    return "; ".join(f"{rule['kind']} {rule['artifact']}" for rule in rules if rule["artifact"] != rule["source"])


def _certificate(certificate: Json) -> Cell:
    found = artifact_folder.verdict(certificate)
    failed = [check.name for check in found.checks if not check.ok]
    if found.ok:
        return Cell(f"ok, {len(found.checks)} check{'s' * (len(found.checks) != 1)}", mark="good")
    return Cell(f"FAILED, {len(failed)} of {len(found.checks)} checks", ", ".join(failed), "bad")


def _perplexity(evaluation: Json) -> Cell:
    rows = {row.name: row for row in run_sections.model_rows(evaluation)}
    changes = {name: "{:+.2f} ±{:.2f}%".format(*row.perplexity_change or (0, 0)) for name, row in rows.items()}
    gptq, rtn = run_sections.MODELS["gptq"], run_sections.MODELS["rtn"]
    drafts = f"greedy MTP drafts accepted: {rows[gptq].acceptance_change or 0:+.2f} points"
    return Cell(f"{changes[gptq]} against the source", f"{rtn} {changes[rtn]}; {drafts}")


def _losses(layers: Sequence[Json]) -> Cell:
    rows = layer_rows(layers)
    losses = [loss for row in rows for loss in row.losses.values()]
    better, matrices = sum(loss.better for loss in losses), sum(loss.experts for loss in losses)
    starved, experts = sum(len(row.blended) for row in rows), sum(row.experts for row in rows)
    return Cell(
        f"GPTQ lost less than round-to-nearest on {better:,} of {matrices:,} matrices",
        f"{starved:,} of {experts:,} experts saw too few tokens for a Hessian of their own",
    )


def _speed(result: Json) -> Cell:
    """At the first shape: the most that one reader gains, and what drafts do to throughput at the ends."""
    rows = bench_rows.speed_rows(result)
    if not rows:
        return Cell("no point was measured", mark="dim")
    some = [row for row in rows if row.shape == rows[0].shape]
    least, most = (end(row.concurrency for row in some) for end in (min, max))
    first = [row for row in some if row.concurrency == least]
    where = f"{least} request{'s' * (least > 1)} at once"
    gained = [row for row in first if row.gain]
    if not gained:
        row = first[0]
        drafts = f"k={row.drafts}" if row.drafts else "no drafts"
        return Cell(f"{row.tpot_ms[0]:,.2f} ms a token, {row.output_tok_s:,.1f} tok/s", f"{where}, {drafts}")
    best = max(gained, key=lambda row: row.gain.tpot_speedup.value if row.gain else 0.0)
    assert best.gain
    text = f"{best.gain.tpot_speedup.value:.2f}x as fast a token with k={best.drafts}, {where}"
    said = ", ".join(_most_throughput([row for row in some if row.concurrency == at]) for at in sorted({least, most}))
    return Cell(text, f"tokens a second against no drafts, with the best k: {said}")


def _most_throughput(rows: Sequence[SpeedRow]) -> str:
    """Of one concurrency."""
    found = [(row.gain.throughput_ratio.value, row.drafts) for row in rows if row.gain]
    return ("{:.2f}x (k={})".format(*max(found)) if found else NOT_MEASURED) + f" at {rows[0].concurrency}"


def _draft(result: Json) -> Cell:
    rows = [row for row in bench_rows.acceptance_rows(result) if row.by_position and row.draft_tokens]
    if not rows:
        return Cell("no draft was made", mark="dim")
    ordered = sorted(rows, key=lambda row: row.by_position[0].value)
    least, most = (f"{100 * row.by_position[0].value:.1f}% ({row.title})" for row in (ordered[0], ordered[-1]))
    together = f"all {len(rows[0].by_position)} drafts of a step together: " + ", ".join(
        f"{row.title} {100 * row.acceptance.value:.1f}%" for row in rows
    )
    text = f"first draft {least}" + (f" to {most}" if len(rows) > 1 else "")
    return Cell(text, together if len(rows[0].by_position) > 1 else "")


def _quality(result: Json) -> Cell:
    rows = bench_rows.quality_rows(result)
    tested = [row for row in rows if row.p is not None]
    if not tested:
        return Cell(f"{len(rows)} figures, none tested against the published", mark="dim")
    sure = [row for row in tested if row.p is not None and row.p < SURE and row.delta is not None]
    if not sure:
        return Cell(
            f"no difference from the published beyond noise, of {len(tested)} tested",
            mark="good" if result["complete"] else "",
        )
    worse = [row for row in sure if (row.delta or 0.0) < 0]
    names = ", ".join(f"{row.title} {row.delta:+.2f} points" for row in sure)
    note = f"{len(tested)} tested at 5%, so chance alone makes {SURE * len(tested):.1f} such"
    return Cell(f"beyond noise: {names}", note, "bad" if worse else "good")


def _tools(result: Json) -> Cell:
    found = bench_rows.conversations(result)
    said = [f"{found.score} of {found.most} points for tool calls"] if found.tools else []
    if found.smoke:
        passed, of = sum(row.passed for row in found.smoke), sum(row.of for row in found.smoke)
        said.append(f"{passed} of {of} conversations as they should be")
    return Cell(", ".join(said) or "nothing was asked")
