"""The metrics profile as tests see it: Prometheus' configuration, and the queries of the dashboard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "docker/metrics"
CONFIG = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# What Grafana puts in the place of its variables: all replicas, and a range of a few scrapes.
VARIABLES = {"$replica": ".*", "$__rate_interval": "20s"}


@dataclass(frozen=True)
class Query:
    """A query as Prometheus gets it, and what the dashboard says of it."""

    text: str
    legend: str
    panel: str
    kind: str
    unit: str


def _queries() -> Iterator[Query]:
    for panel in PANELS:
        for target in panel["targets"]:
            text = target["expr"]
            for name, value in VARIABLES.items():
                text = text.replace(name, value)
            unit = panel["fieldConfig"]["defaults"]["unit"]
            yield Query(text, target["legendFormat"], panel["title"], panel["type"], unit)


QUERIES = list(_queries())


def program(name: str) -> str:
    """The path of one of Prometheus' programs."""
    found = shutil.which(name)
    assert found, "apt-get install prometheus"
    return found
