"""Every figure of a report as one CSV file, a figure a line, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator

from v4forge.bench.results import BASELINE
from v4forge.quantization.layer_reports import KINDS, layer_rows
from v4forge.reporting import cost, prediction
from v4forge.reporting.inputs import Inputs
from v4forge.reporting.tables import Figure

COLUMNS = ("of", "about", "part", "figure", "value", "low", "high", "unit")
OURS = "this artifact"


def text(inputs: Inputs) -> str:
    """The file; low and high are the ends of a 95% interval, empty where there is none."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for of, about, figure in _figures(inputs):
        values = (_number(value) for value in (figure.value, figure.low, figure.high))
        writer.writerow([of, about, figure.part, figure.name, *values, figure.unit])
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(value)


def _figures(inputs: Inputs) -> Iterator[tuple[str, str, Figure]]:
    for name, told in inputs.benches.items():
        for figure in told.bench.figures(told.rows):
            yield told.other or OURS, name, figure
    for name, told in inputs.baseline.items():
        for figure in told.bench.figures(told.rows):
            yield BASELINE, name, figure
    if "speed" in inputs.benches and inputs.price:
        told = inputs.benches["speed"]
        for figure in cost.figures(told.rows, inputs.price):
            yield told.other or OURS, "speed", figure
    for figure in prediction.figures(inputs.deep) if inputs.deep else ():
        yield OURS, "prediction", figure
    for figure in _layers(inputs):
        yield OURS, "calibration", figure


def _layers(inputs: Inputs) -> Iterator[Figure]:
    """What each layer lost, and how many tokens its experts saw."""
    for row in layer_rows(inputs.layers):
        part = f"layer {row.layer}"
        for kind in (kind for kind in KINDS if kind in row.losses):
            loss = row.losses[kind]
            yield Figure(part, f"{kind} loss, round-to-nearest", loss.rtn, "%")
            if loss.same_scales is not None:
                yield Figure(part, f"{kind} loss, round-to-nearest at the same scales", loss.same_scales, "%")
            yield Figure(part, f"{kind} loss, GPTQ", loss.gptq, "%")
        for name, value in (("fewest", row.fewest), ("median", row.median), ("most", row.most)):
            yield Figure(part, f"tokens per expert, {name}", value, "tokens")
        yield Figure(part, "starved experts", len(row.blended), "experts")
