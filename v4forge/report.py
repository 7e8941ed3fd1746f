"""What a run says: rows made from the JSON files of its stages and benches, as a terminal table, a page, Markdown.

Everything here is a pure function of those files' contents. A key that they lack is a KeyError; the caller knows the
file that it belongs to. Perplexities are per token; shares are kept as percent where they are shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.table import Table

from v4forge import charts, figures, headline, shown
from v4forge.bench_tables import TITLES, section
from v4forge.headline import COMMANDS
from v4forge.layer_rows import KINDS, Json, cost_rows, layer_rows
from v4forge.shown import Section

TEMPLATES = Path(__file__).parent / "templates"
MODELS = {"source": "source", "rtn": "round-to-nearest", "gptq": "GPTQ"}
LEAVES_LISTED = 40  # of a manifest entry; a larger one is left to the manifest
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ModelRow:
    """One model on the held-out tokens. Changes are against the source, None for the source itself."""

    name: str
    megabytes: float  # 10^6 bytes of shards
    perplexity: float
    perplexity_change: tuple[float, float] | None  # percent, and its standard error over the sequences
    acceptance: float  # percent of greedy MTP drafts that the main model would choose too
    acceptance_change: float | None  # percentage points


def model_rows(evaluation: Json) -> list[ModelRow]:
    """Source, round-to-nearest and GPTQ, in this order."""
    models = evaluation["models"]
    source = models["source"]
    rows = []
    for key, name in MODELS.items():
        model = models[key]
        change = model["perplexity_change"]["percent"], model["perplexity_change"]["standard_error"]
        points = 100 * (model["mtp_acceptance"] - source["mtp_acceptance"])
        rows.append(
            ModelRow(
                name,
                megabytes=model["bytes"] / 1e6,
                perplexity=model["perplexity"],
                perplexity_change=None if key == "source" else change,
                acceptance=100 * model["mtp_acceptance"],
                acceptance_change=None if key == "source" else points,
            )
        )
    return rows


@dataclass(frozen=True)
class StageRow:
    """A stage's last run."""

    name: str
    elapsed_s: float
    started: str
    command: str


def stage_rows(run: Json) -> list[StageRow]:
    """The stages of run.json in the order in which they began."""
    rows = [StageRow(name, run[name]["elapsed_s"], run[name]["started"], run[name]["command"]) for name in run]
    return sorted(rows, key=lambda row: row.started)


@dataclass(frozen=True)
class ImageRow:
    """An image that stages ran in, and its layers as (MiB, the step that made it)."""

    id: str
    lane: str
    stages: list[str]
    layers: list[tuple[float, str]]


def image_rows(run: Json) -> list[ImageRow]:
    """The images of run.json; none for stages that ran on the host."""
    rows: dict[str, ImageRow] = {}
    for stage in stage_rows(run):
        if image := run[stage.name].get("image"):
            layers = [(layer["bytes"] / 2**20, layer["step"]) for layer in image["layers"]]
            rows.setdefault(image["id"], ImageRow(image["id"], image["lane"], [], layers)).stages.append(stage.name)
    return list(rows.values())


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The certificate's checks, failed ones first; `line` is what a run ends with."""

    ok: bool
    line: str
    checks: list[Check]


def verdict(certificate: Json) -> Verdict:
    """A certificate is good when it says so and so does each of its checks; one without checks proves nothing."""
    checks = [Check(check["name"], check["ok"] is True, check["detail"]) for check in certificate["checks"]]
    failed = sum(not check.ok for check in checks)
    ok = certificate["ok"] is True and bool(checks) and not failed
    line = "certificate: ok" if ok else f"certificate: FAILED ({failed} of {len(checks)} checks)"
    return Verdict(ok, line, sorted(checks, key=lambda check: check.ok))


Group = tuple[str, list[tuple[str, str]]]


def provenance(manifest: Json) -> list[Group]:
    """The manifest for people: (title, rows), what has one value first. The losses by layer have a place of their own.

    A listing of files becomes its count, size and one digest; what is too long to read is left to the manifest.
    """
    plain: list[tuple[str, str]] = []
    groups: list[Group] = []
    for key, value in manifest.items():
        rows = [] if key == "layers" else list(_leaves(value, key))
        if len(rows) > LEAVES_LISTED:
            plain.append((key, f"{len(rows):,} values, in manifest.json"))
        elif len(rows) > 1:
            groups.append((key, [(path.removeprefix(f"{key}."), shown) for path, shown in rows]))
        else:
            plain += rows
    return [("", plain), *groups]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every plain value below `value`; a listing of files is one."""
    if isinstance(value, Mapping) and (files := _files(value)):
        yield path, files
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list) and any(isinstance(inner, Mapping | list) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{number}")
    elif isinstance(value, list):
        yield path, ", ".join(str(inner) for inner in value) or "none"
    else:
        yield path, "none" if value is None else str(value)


def _files(listing: Json) -> str:
    """A summary of {name: sha256} or {name: {"sha256", "bytes"}}; '' for any other mapping."""
    entries = {name: entry if isinstance(entry, Mapping) else {"sha256": entry} for name, entry in listing.items()}
    digests = {name: str(entry.get("sha256")) for name, entry in entries.items()}
    if not digests or "sha256" in digests or not all(SHA256.fullmatch(digest) for digest in digests.values()):
        return ""
    size = sum(entry.get("bytes", 0) for entry in entries.values())
    total = f", {size / 1e6:,.1f} MB" if size else ""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return f"{len(digests):,} files{total}; sha256 of their list {hashlib.sha256(lines.encode()).hexdigest()}"


def models_table(evaluation: Json) -> Table:
    """The table that a run ends with."""
    table = Table(box=box.SIMPLE_HEAD, caption=heldout_line(evaluation), caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("size, MB", "perplexity", "change", "MTP acc.", "points"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in model_rows(evaluation):
        table.add_row(
            row.name,
            f"{row.megabytes:,.1f}",
            f"{row.perplexity:.3f}",
            "" if row.perplexity_change is None else "{:+.2f}±{:.2f}%".format(*row.perplexity_change),
            f"{row.acceptance:.1f}%",
            "" if row.acceptance_change is None else f"{row.acceptance_change:+.2f}",
        )
    return table


def stages_line(rows: Sequence[StageRow]) -> str:
    """Seconds per stage in one line, '' when there are none."""
    if not rows:
        return ""
    total = sum(row.elapsed_s for row in rows)
    return "seconds: " + ", ".join([*(f"{row.name} {row.elapsed_s:.1f}" for row in rows), f"together {total:.1f}"])


def heldout_line(evaluation: Json) -> str:
    heldout = evaluation["heldout"]
    return (
        f"{heldout['tokens']:,} held-out tokens of {heldout['file']}; "
        f"unigram perplexity {evaluation['unigram_perplexity']:.0f}"
    )


@dataclass(frozen=True)
class Inputs:
    """What there is to report on; what was not made yet is None or empty."""

    evaluation: Json | None = None
    certificate: Json | None = None
    layers: Sequence[Json] = ()
    run: Json = field(default_factory=dict)
    manifest: Json | None = None
    results: Mapping[str, Json] = field(default_factory=dict)  # of the benches

    @property
    def missing(self) -> list[tuple[str, str]]:
        """(what, the command that makes it), in the order of the page."""
        there = {
            **{bench: bench in self.results for bench in TITLES},
            "evaluation": self.evaluation,
            "layers": self.layers,
            "certificate": self.certificate,
            "manifest": self.manifest,
        }
        return [(MISSING[name][0], MISSING[name][1]) for name in there if not there[name]]


MISSING = {
    **{bench: (title, COMMANDS[bench]) for bench, title in TITLES.items()},
    "evaluation": ("Perplexity of source, round-to-nearest and GPTQ", "make demo"),
    "layers": ("Losses by layer", "make calibrate"),
    "certificate": ("Certificate", "make verify"),
    "manifest": ("Provenance of the artifact", "make postprocess"),
}
NO_CERTIFICATE = "certificate: not there"


def sections(results: Mapping[str, Json]) -> list[Section]:
    """What each bench says that was run, with its figures."""
    measured = [(bench, results[bench]) for bench in TITLES if bench in results]
    return [replace(section(bench, result), drawings=figures.of(bench, result)) for bench, result in measured]


def page(inputs: Inputs) -> str:
    """The report as one HTML document that needs no other file."""
    made = headline.pipeline(inputs.run, inputs.manifest)
    judged = verdict(inputs.certificate) if inputs.certificate is not None else None
    return _rendered(
        "report.html.j2",
        **_layers(inputs.layers),
        headline=headline.table(inputs.results, made),
        compared=headline.measures_published(inputs.results, made),
        sections=sections(inputs.results),
        missing=inputs.missing,
        models=model_rows(inputs.evaluation) if inputs.evaluation else [],
        heldout=heldout_line(inputs.evaluation) if inputs.evaluation else "",
        heldout_sha256=inputs.evaluation["heldout"]["sha256"] if inputs.evaluation else "",
        stages=stage_rows(inputs.run),
        images=image_rows(inputs.run),
        verdict=judged,
        line=judged.line if judged else NO_CERTIFICATE,
        provenance=provenance(inputs.manifest) if inputs.manifest is not None else [],
    )


def markdown(inputs: Inputs, level: int = 2) -> str:
    """The tables of the benches as Markdown, under headings of this level, for a model card."""
    made = headline.pipeline(inputs.run, inputs.manifest)
    first = headline.table(inputs.results, made)
    parts = [f"{'#' * level} {first.title}\n", shown.markdown_table(first), f"{first.note}\n"]
    parts += [shown.markdown_section(section(bench, inputs.results.get(bench)), level) for bench in TITLES]
    return "\n".join(parts)


def calibration_page(layers: Sequence[Json]) -> str:
    """What GPTQ left of one or more layers, as one HTML document that needs no other file; its times are a run's."""
    return _rendered("calibration.html.j2", **_layers(layers), costs=cost_rows(layers))


def _layers(layers: Sequence[Json]) -> dict[str, Any]:
    """What layers.html.j2 shows."""
    rows = layer_rows(layers)
    if not rows:
        return {"layers": []}
    losses = [loss for row in rows for loss in row.losses.values()]
    return {
        "layers": rows,
        "kinds": KINDS,
        "loss_charts": charts.loss_charts(rows),
        "token_charts": charts.token_charts(rows),
        "chart": {"height": charts.CHART_HEIGHT, "left": charts.LEFT, "right": charts.RIGHT, "bottom": charts.BOTTOM},
        "better": sum(loss.better for loss in losses),
        "matrices": sum(loss.experts for loss in losses),
    }


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
