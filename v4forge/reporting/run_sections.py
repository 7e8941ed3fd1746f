"""What the stages of a run left, as rows and tables: losses, certificate, provenance, seconds.

Pure functions of the JSON files' contents. A key that they lack is a KeyError; the caller knows the file that it
belongs to.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v4forge.artifact_folder import Verdict
from v4forge.quantization.layer_reports import KINDS, LayerRow
from v4forge.reporting.tables import Cell, Json, Table, columns, number
from v4forge.units import MB, MIB

LEAVES_LISTED = 40  # of a manifest entry; a larger one is left to the manifest
SHA256 = re.compile("[0-9a-f]{64}")


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
            layers = [(layer["bytes"] / MIB, layer["step"]) for layer in image["layers"]]
            rows.setdefault(image["id"], ImageRow(image["id"], image["lane"], [], layers)).stages.append(stage.name)
    return list(rows.values())


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
        many = f"{len(value):,} values, in manifest.json"
        yield path, many if len(value) > LEAVES_LISTED else ", ".join(str(inner) for inner in value) or "none"
    else:
        yield path, "none" if value is None else str(value)


def _files(listing: Json) -> str:
    """A summary of {name: sha256} or {name: {"sha256", "bytes"}}; '' for any other mapping."""
    entries = {name: entry if isinstance(entry, Mapping) else {"sha256": entry} for name, entry in listing.items()}
    digests = {name: str(entry.get("sha256")) for name, entry in entries.items()}
    if not digests or "sha256" in digests or not all(SHA256.fullmatch(digest) for digest in digests.values()):
        return ""
    size = sum(entry.get("bytes", 0) for entry in entries.values())
    total = f", {size / MB:,.1f} MB" if size else ""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return f"{len(digests):,} files{total}; sha256 of their list {hashlib.sha256(lines.encode()).hexdigest()}"


def stages_line(rows: Sequence[StageRow]) -> str:
    """Seconds per stage in one line, '' when there are none."""
    if not rows:
        return ""
    total = sum(row.elapsed_s for row in rows)
    return "seconds: " + ", ".join([*(f"{row.name} {row.elapsed_s:.1f}" for row in rows), f"together {total:.1f}"])


def losses_table(rows: Sequence[LayerRow]) -> Table:
    """The share of output energy that each layer's expert matrices lose, means over its experts."""
    heads = [f"{kind} {method}, %" for kind in KINDS for method in ("nearest", "nearest, same scales", "GPTQ")]
    lines = []
    for row in rows:
        by_kind = [row.losses.get(kind) for kind in KINDS]
        losses = [number(getattr(loss, way, None), 3) for loss in by_kind for way in ("rtn", "same_scales", "gptq")]
        lines.append([Cell(str(row.layer)), Cell(row.attention), *losses])
    return Table("losses", "Losses by layer", columns("<layer", "<attention", *heads), lines)


def certificate_table(found: Verdict) -> Table:
    """The checks of a certificate."""
    rows = []
    for check in found.checks:
        said = Cell("ok", mark="good") if check.ok else Cell("FAILED", mark="bad")
        rows.append([Cell(check.name), said, Cell(check.detail)])
    title = found.line.capitalize() if found.ok else found.line
    return Table("certificate", title, columns("<check", "", "<detail"), rows)
