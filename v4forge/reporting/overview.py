"""The first table of the report: a line for each thing that there is to know, so that one look says whether to use the
artifact. What was not measured is a line too, with the command that measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from v4forge import artifact_folder
from v4forge.bench.results import command_of
from v4forge.quantization.layer_reports import layer_rows
from v4forge.reporting import prediction
from v4forge.reporting.benches import BENCHES, Told
from v4forge.reporting.inputs import Inputs
from v4forge.reporting.prediction import ModelRow
from v4forge.reporting.tables import NOT_MEASURED, Cell, Json, Table, columns, plus_minus


def table(inputs: Inputs) -> Table:
    """The stages' lines, then the benches'."""
    rows = []
    for name, (title, command, said) in STAGES.items():
        content = getattr(inputs, name)
        rows.append([Cell(title), said(content) if content else Cell(NOT_MEASURED, command, "dim")])
    for name, bench in BENCHES.items():
        told = inputs.benches.get(name)
        if told and told.other:
            rows.append(
                [Cell(bench.TITLE), Cell(NOT_MEASURED, f"{command_of(name)}; here it is of {told.other}", "dim")]
            )
        elif told:
            rows.append([Cell(bench.TITLE, _marks(told)), told.overview])
        else:
            rows.append([Cell(bench.TITLE), Cell(NOT_MEASURED, command_of(name), "dim")])
    if inputs.baseline:
        verdict = inputs.beside.verdict if inputs.beside else "no bench was run on both"
        rows.append([Cell("Beside the baseline"), Cell(verdict, mark="" if inputs.beside else "dim")])
    return Table("glance", "At a glance", columns("<", "<"), rows)


def _marks(told: Told) -> str:
    return "; ".join(mark for mark in (told.worth.short, "" if told.worth.complete else "unfinished") if mark)


def _artifact(manifest: Json) -> Cell:
    shards = [entry["bytes"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")]
    total = sum(shards)
    size = f"{total / 1e9:,.1f} GB" if total >= 1e9 else f"{total / 1e6:,.1f} MB"
    return Cell(f"{size} in {len(shards)} shard{'s' * (len(shards) != 1)}", _recipe(manifest))


def _recipe(manifest: Json) -> str:
    """What is in another form than upstream's."""
    rules = (manifest.get("recipe") or {}).get("rules") or ()
    return "; ".join(f"{rule['kind']} {rule['artifact']}" for rule in rules if rule["artifact"] != rule["source"])


def _certificate(certificate: Json) -> Cell:
    found = artifact_folder.verdict(certificate)
    if found.ok:
        return Cell(f"ok, {len(found.checks)} check{'s' * (len(found.checks) != 1)}", mark="good")
    return Cell(f"FAILED, {len(found.failed)} of {len(found.checks)} checks", ", ".join(found.failed), "bad")


def _prediction(deep: Json) -> Cell:
    """KL divergence and agreement of the artifact, and of what stood beside it."""

    def told(row: ModelRow) -> str:
        assert row.kl and row.agreement
        same = plus_minus(row.agreement.mapped(lambda share: 100 * share), ".1f", "%")
        return f"KL {plus_minus(row.kl, '.4f')} nats a token, {same} of the most likely tokens the same"

    _, *others, own = prediction.model_rows(deep)
    return Cell(told(own), "; ".join(f"{row.name}: {told(row)}" for row in others))


def _losses(layers: Sequence[Json]) -> Cell:
    rows = layer_rows(layers)
    losses = [loss for row in rows for loss in row.losses.values()]
    better, matrices = sum(loss.better for loss in losses), sum(loss.experts for loss in losses)
    starved, experts = sum(len(row.blended) for row in rows), sum(row.experts for row in rows)
    return Cell(
        f"GPTQ lost less than round-to-nearest on {better:,} of {matrices:,} matrices",
        f"{starved:,} of {experts:,} experts saw too few tokens for a Hessian of their own",
    )


# Of what is no bench, by its name in Inputs: what a line calls it, what makes it, and what it says.
STAGES: dict[str, tuple[str, str, Callable[..., Cell]]] = {
    "manifest": ("Artifact", "make postprocess", _artifact),
    "certificate": ("Certificate", "make verify", _certificate),
    "deep": ("Prediction beside the source", prediction.COMMAND, _prediction),
    "layers": ("Losses by layer", "make calibrate", _losses),
}
