"""The report of a run: one HTML page, and the tables of it as Markdown for a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from v4forge import artifact_folder
from v4forge.bench.terms import TERMS, spelled_out
from v4forge.quantization.layer_reports import layer_rows
from v4forge.reporting import (
    calibration_page,
    cost,
    header,
    overview,
    prediction,
    published_comparison,
    run_sections,
    tables,
    two_engines,
)
from v4forge.reporting.benches import BENCHES, Told, not_measured
from v4forge.reporting.inputs import Inputs
from v4forge.reporting.rendering import rendered
from v4forge.reporting.tables import Section

NO_CERTIFICATE = "certificate: not there"


def page(inputs: Inputs) -> str:
    """The report as one HTML document that needs no other file."""
    made = published_comparison.pipeline(inputs.run, inputs.manifest)
    judged = artifact_folder.verdict(inputs.certificate) if inputs.certificate is not None else None
    values = dict(
        **calibration_page.shown(inputs.layers),
        about=header.rows(inputs),
        links=header.links(inputs),
        terms=TERMS,
        glance=overview.table(inputs),
        beside=inputs.beside,
        headline=published_comparison.table(inputs.benches, made),
        compared=published_comparison.measures_published(inputs.benches, made),
        sections=[_priced(inputs.benches[name], inputs.price) for name in BENCHES if name in inputs.benches],
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
    return rendered("report.html.j2", **values, contents=_contents(inputs, values))


def _priced(told: Told, price: float | None) -> Section:
    """The section of a bench; of speed with what tokens cost, at a price that the Markdown does not know."""
    if told.name != "speed" or not price or not told.rows.points:
        return told.drawn
    return replace(told.drawn, tables=[*told.drawn.tables, cost.table(told.rows, price)])


def _contents(inputs: Inputs, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(place, title) of the parts that there are, in their order."""
    parts = [
        ("part-glance", values["glance"].title, True),
        ("part-baseline", "Beside the baseline", values["beside"]),
        ("published", values["headline"].title, True),
        ("part-prediction", "Prediction beside the source", values["models"]),
        *((f"bench-{name}", told.bench.TITLE, True) for name, told in inputs.benches.items()),
        ("part-losses", "Losses by layer", values["layers"]),
        ("part-tokens", "Tokens per expert", values["layers"]),
        ("part-engines", "Two implementations of GPTQ", values["engines"]),
        ("part-stages", "Seconds per stage", values["stages"]),
        ("part-certificate", "Certificate", values["certificate"]),
        ("part-provenance", "Provenance", values["provenance"]),
    ]
    return [(place, title) for place, title, there in parts if there]


def markdown(inputs: Inputs, level: int = 2) -> str:
    """The tables of the page as Markdown, under headings of this level, for a model card."""
    made = published_comparison.pipeline(inputs.run, inputs.manifest)
    first = [overview.table(inputs)]
    first += [inputs.beside.table] if inputs.beside else []
    first.append(published_comparison.table(inputs.benches, made))
    if inputs.deep:
        first.append(prediction.table(inputs.deep))
    last = [run_sections.losses_table(layer_rows(inputs.layers))] if inputs.layers else []
    last += [two_engines.table(inputs.engines)] if inputs.engines else []
    if inputs.certificate is not None:
        last.append(run_sections.certificate_table(artifact_folder.verdict(inputs.certificate)))
    benches = [inputs.benches[name].section if name in inputs.benches else not_measured(name) for name in BENCHES]
    return "\n".join(
        [
            tables.markdown_titled(first[0], level),
            f"{tables.plain(spelled_out())}\n",
            *(tables.markdown_titled(table, level) for table in first[1:]),
            *(tables.markdown_section(section, level) for section in benches),
            *(tables.markdown_titled(table, level) for table in last),
        ]
    )
