"""The alerts of the metrics profile as tests see them: rules, and what they select."""

from __future__ import annotations

import re
from typing import Any

import yaml
from dashboard import FOLDER

FILE = FOLDER / "alerts.yml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(FILE.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
SELECTOR = re.compile(r"\b((?:vllm:|haproxy_|v4forge:|v4forge_|DCGM_|up\b)[\w:]*)(\{[^}]*\})?")


def selected() -> set[tuple[str, str]]:
    """The name and the labels of every series that rules select and a replica, the router or Prometheus has."""
    found = {(name, labels) for rule in RULES for name, labels in SELECTOR.findall(rule["expr"])}
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    return {(name, labels) for name, labels in found if name not in recorded and not name.startswith("DCGM_")}
