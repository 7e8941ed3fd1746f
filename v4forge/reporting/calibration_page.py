"""What calibration left, layer by layer: a part of the report, and a page of its own beside the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from v4forge.quantization.layer_reports import KINDS, Json, cost_rows, layer_rows, means
from v4forge.reporting.layer_charts import LOADS, heat_map, loss_charts, token_charts
from v4forge.reporting.rendering import rendered


def page(layers: Sequence[Json]) -> str:
    """What GPTQ left of one or more layers, as one HTML document that needs no other file; its times are a run's."""
    return rendered("calibration.html.j2", **shown(layers), costs=cost_rows(layers))


def shown(layers: Sequence[Json]) -> dict[str, Any]:
    """What layers.html.j2 shows."""
    rows = layer_rows(layers)
    if not rows:
        return {"layers": []}
    losses = [loss for row in rows for loss in row.losses.values()]
    found = means(losses)
    return {
        "layers": rows,
        "kinds": KINDS,
        "loss_charts": loss_charts(rows),
        "token_charts": token_charts(rows),
        "heat_map": heat_map(rows),
        "loads": LOADS,
        "means": found,
        "better": sum(loss.better for loss in losses),
        "better_at_same_scales": sum(loss.better_at_same_scales for loss in losses),
        "matrices": sum(loss.experts for loss in losses),
    }
