"""What the report is of: model, profile, date, machine, commit, artifact, and where the other pages are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from v4forge.bench.results import sums_of
from v4forge.reporting.benches import machine_line
from v4forge.reporting.inputs import Inputs
from v4forge.reporting.tables import Json
from v4forge.units import GIB

UNKNOWN = "not known"


# Other pages and files of a run, as seen from its work folder.
PAGES = {
    "model card": "reports/card.html",
    "calibration": "layers/calibration.html",
    "certificate": "artifact/certificate.json",
    "manifest": "artifact/manifest.json",
    "figures as CSV": "reports/figures.csv",
}


def rows(inputs: Inputs) -> list[tuple[str, str]]:
    """(name, text), what nothing tells left out."""
    found = [("model", model(inputs)), ("profile", inputs.profile), ("artifact", artifact(inputs))]
    return [(name, text) for name, text in [*found, *_made(inputs.run), *_measured(inputs)] if text]


def links(inputs: Inputs) -> list[tuple[str, str]]:
    """(title, address) of the other pages that there are, as seen from the report's folder."""
    there = [(title, name) for title, name in PAGES.items() if name in inputs.pages]
    return [(title, os.path.relpath(name, "reports")) for title, name in there]


def model(inputs: Inputs) -> str:
    """The source's repository, or the model's dimensions."""
    source = (inputs.manifest or {}).get("source") or {}
    shape = inputs.config or next((each.result["target"].get("artifact") or {} for each in inputs.ours.values()), {})
    if not source.get("repo"):
        layers, hidden, experts = (shape.get(name) for name in ("num_hidden_layers", "hidden_size", "n_routed_experts"))
        return f"DeepSeek-V4 of {layers} layers, hidden size {hidden}, {experts} experts" if layers else ""
    revision = f" at {source['revision']}" if source.get("revision") else ""
    return f"{source['repo']}{revision}"


def artifact(inputs: Inputs) -> str:
    """By the digest of its SHA256SUMS, which certificate and results name it by; without the folder, of what was
    measured."""
    measured = [] if inputs.sums else [sums_of(each.result) or UNKNOWN for each in inputs.ours.values()]
    return "; ".join(f"SHA256SUMS {sums}" for sums in dict.fromkeys([inputs.sums] if inputs.sums else measured))


def _made(run: Mapping[str, Json]) -> Iterator[tuple[str, str]]:
    """When, where and by which commits the stages ran."""
    stages = sorted((run[name] for name in run), key=lambda stage: str(stage["started"]))
    if not stages:
        return
    yield (
        "made",
        _told(
            [str(stage["started"]) for stage in stages],
            [_machine(stage["machine"]) for stage in stages if stage.get("machine")],
            [str(stage["revision"]) for stage in stages if stage.get("revision")],
        ),
    )


def _measured(inputs: Inputs) -> Iterator[tuple[str, str]]:
    results = [each.result for each in inputs.ours.values()]
    if not results:
        return
    yield (
        "measured",
        _told(
            sorted(str(result["started"]) for result in results),
            [machine_line(result["machine"]) for result in results],
            [str(result["versions"].get("v4forge") or UNKNOWN) for result in results],
        ),
    )


def _told(times: Sequence[str], machines: Sequence[str], commits: Sequence[str]) -> str:
    """The days of the first and the last, each machine and each commit once."""
    days = " to ".join(dict.fromkeys(time[:10] for time in (times[0], times[-1])))
    on = f"; {'; '.join(dict.fromkeys(machines))}" if machines else ""
    return days + on + (f"; commit {', '.join(dict.fromkeys(commits))}" if commits else "")


def _machine(told: Json) -> str:
    """As the runner notes it."""
    shown = {name: told.get(name) for name in ("gpus", "driver", "cpu")}
    memory = told.get("memory_bytes")
    return machine_line(shown | {"cpus": told.get("cores"), "memory_gib": round(memory / GIB, 1) if memory else None})
