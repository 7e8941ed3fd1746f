"""The report of a run: one HTML page, and the tables of it as Markdown for a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from v4forge import artifact_folder
from v4forge.bench.results import BENCHES
from v4forge.quantization.layer_reports import KINDS, Json, cost_rows, layer_rows
from v4forge.reporting import bench_tables, figures, layer_charts, overview, published_comparison, run_sections
from v4forge.reporting import tables as report_tables
from v4forge.reporting.overview import Inputs
from v4forge.reporting.tables import Section

TEMPLATES = Path(__file__).parent / "templates"
NO_CERTIFICATE = "certificate: not there"


def sections(results: Mapping[str, Json]) -> list[Section]:
    """What each bench says that was run, with its figures."""
    measured = [(bench, results[bench]) for bench in BENCHES if bench in results]
    return [
        replace(bench_tables.section(bench, result), drawings=figures.of(bench, result)) for bench, result in measured
    ]


def page(inputs: Inputs) -> str:
    """The report as one HTML document that needs no other file."""
    made = published_comparison.pipeline(inputs.run, inputs.manifest)
    judged = artifact_folder.verdict(inputs.certificate) if inputs.certificate is not None else None
    return _rendered(
        "report.html.j2",
        **_layers(inputs.layers),
        glance=overview.table(inputs),
        headline=published_comparison.table(inputs.results, made),
        compared=published_comparison.measures_published(inputs.results, made),
        sections=sections(inputs.results),
        models=run_sections.models_table(inputs.evaluation) if inputs.evaluation else None,
        heldout_sha256=inputs.evaluation["heldout"]["sha256"] if inputs.evaluation else "",
        stages=run_sections.stage_rows(inputs.run),
        images=run_sections.image_rows(inputs.run),
        ok=judged is not None and judged.ok,
        line=judged.line if judged else NO_CERTIFICATE,
        certificate=run_sections.certificate_table(judged) if judged else None,
        provenance=run_sections.provenance(inputs.manifest) if inputs.manifest is not None else [],
    )


def markdown(inputs: Inputs, level: int = 2) -> str:
    """The tables of the page as Markdown, under headings of this level, for a model card."""
    tables = [
        overview.table(inputs),
        published_comparison.table(inputs.results, published_comparison.pipeline(inputs.run, inputs.manifest)),
    ]
    if inputs.evaluation:
        tables.append(run_sections.models_table(inputs.evaluation))
    last = [run_sections.losses_table(layer_rows(inputs.layers))] if inputs.layers else []
    if inputs.certificate is not None:
        last.append(run_sections.certificate_table(artifact_folder.verdict(inputs.certificate)))
    benches = [bench_tables.section(bench, inputs.results.get(bench)) for bench in BENCHES]
    return "\n".join(
        [
            *(report_tables.markdown_titled(table, level) for table in tables),
            *(report_tables.markdown_section(section, level) for section in benches),
            *(report_tables.markdown_titled(table, level) for table in last),
        ]
    )


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
        "loss_charts": layer_charts.loss_charts(rows),
        "token_charts": layer_charts.token_charts(rows),
        "chart": {
            "height": layer_charts.CHART_HEIGHT,
            "left": layer_charts.LEFT,
            "right": layer_charts.RIGHT,
            "bottom": layer_charts.BOTTOM,
        },
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
