"""The report of a run: one HTML page, and the tables of it as Markdown for a model card."""

from __future__ import annotations

from v4forge import artifact_folder
from v4forge.quantization.layer_reports import layer_rows
from v4forge.reporting import (
    calibration_page,
    overview,
    prediction,
    published_comparison,
    run_sections,
    tables,
    two_engines,
)
from v4forge.reporting.benches import BENCHES, not_measured
from v4forge.reporting.inputs import Inputs
from v4forge.reporting.rendering import rendered

NO_CERTIFICATE = "certificate: not there"


def page(inputs: Inputs) -> str:
    """The report as one HTML document that needs no other file."""
    made = published_comparison.pipeline(inputs.run, inputs.manifest)
    judged = artifact_folder.verdict(inputs.certificate) if inputs.certificate is not None else None
    return rendered(
        "report.html.j2",
        **calibration_page.shown(inputs.layers),
        glance=overview.table(inputs),
        headline=published_comparison.table(inputs.benches, made),
        compared=published_comparison.measures_published(inputs.benches, made),
        sections=[inputs.benches[name].drawn for name in BENCHES if name in inputs.benches],
        engines=two_engines.table(inputs.engines) if inputs.engines else None,
        engines_said=two_engines.said(inputs.engines) if inputs.engines else (),
        models=prediction.table(inputs.deep) if inputs.deep else None,
        text_sha256=inputs.deep["text"]["sha256"] if inputs.deep and "text" in inputs.deep else "",
        stages=run_sections.stage_rows(inputs.run),
        images=run_sections.image_rows(inputs.run),
        ok=judged is not None and judged.ok,
        line=judged.line if judged else NO_CERTIFICATE,
        certificate=run_sections.certificate_table(judged) if judged else None,
        provenance=run_sections.provenance(inputs.manifest) if inputs.manifest is not None else [],
    )


def markdown(inputs: Inputs, level: int = 2) -> str:
    """The tables of the page as Markdown, under headings of this level, for a model card."""
    made = published_comparison.pipeline(inputs.run, inputs.manifest)
    first = [overview.table(inputs), published_comparison.table(inputs.benches, made)]
    if inputs.deep:
        first.append(prediction.table(inputs.deep))
    last = [run_sections.losses_table(layer_rows(inputs.layers))] if inputs.layers else []
    last += [two_engines.table(inputs.engines)] if inputs.engines else []
    if inputs.certificate is not None:
        last.append(run_sections.certificate_table(artifact_folder.verdict(inputs.certificate)))
    benches = [inputs.benches[name].section if name in inputs.benches else not_measured(name) for name in BENCHES]
    return "\n".join(
        [
            *(tables.markdown_titled(table, level) for table in first),
            *(tables.markdown_section(section, level) for section in benches),
            *(tables.markdown_titled(table, level) for table in last),
        ]
    )
