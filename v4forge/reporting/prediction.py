"""How the artifact predicts beside its source, on the same tokens: what verify --deep left in the certificate.

Pure functions of the certificate's "deep"; a key that it lacks is a KeyError, and the caller knows the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from v4forge.intervals import Estimate
from v4forge.reporting.tables import NONE, Cell, Figure, Json, Table, columns, ends, estimated, number, percent
from v4forge.units import MB

COMMAND = "python -m scripts.verify … --deep N"


@dataclass(frozen=True)
class ModelRow:
    """One model on the tokens, with 95% intervals; what sets it beside the source is None for that itself."""

    name: str
    megabytes: float | None  # 10^6 bytes of shards
    perplexity: Estimate
    drafts: list[Estimate]  # by position, the share of greedy drafts that the main model would choose too
    kl: Estimate | None = None  # nats a token
    agreement: Estimate | None = None  # share of tokens with the same most likely one
    perplexity_change: Estimate | None = None  # percent


def model_rows(deep: Json) -> list[ModelRow]:
    """The source, others that stood beside, and the artifact last."""
    models = deep["models"]
    others = sorted(models.keys() - {"source", "artifact"})
    return [_row(name, models[name]) for name in ("source", *others, "artifact")]


def _row(key: str, model: Json) -> ModelRow:
    drafts = [Estimate.of(each["acceptance_after_accepted"]) for each in model["drafts"]]
    size = model["bytes"] / MB if "bytes" in model else None
    name = model.get("made") or ("this artifact" if key == "artifact" else key)
    row = (name, size, Estimate.of(model["perplexity"]), drafts)
    if "kl_nats" not in model:
        return ModelRow(*row)
    told = (model["kl_nats"]["mean"], model["top1_agreement"], model["perplexity_change_percent"])
    return ModelRow(*row, *(Estimate.of(each) for each in told))


def figures(deep: Json) -> list[Figure]:
    """Of every model, for programs."""
    made = []
    for row in model_rows(deep):
        told = [
            ("perplexity", row.perplexity, ""),
            ("change of perplexity", row.perplexity_change, "%"),
            ("same most likely token", row.agreement, ""),
            ("KL divergence a token", row.kl, "nats"),
            *((f"acceptance rate, {_draft(i)}", each, "") for i, each in enumerate(row.drafts)),
        ]
        made += [estimated(row.name, name, value, unit) for name, value, unit in told if value is not None]
    return made


def text_line(deep: Json) -> str:
    """Of which text, and how many tokens of it."""
    text = deep.get("text")
    words = f"{deep['tokens']:,} tokens{' of ' + text['file'] if text else ''} in {deep['sequences']:,} sequences"
    return words + (f"; unigram perplexity {deep['unigram_perplexity']:.0f}" if text else "")


def _figure(value: Estimate | None, form: str, unit: str = "") -> Cell:
    if value is None or math.isnan(value.value):
        return NONE
    return Cell(f"{value.value:{form}}{unit}", ends(value, form))


def _draft(i: int) -> str:
    return "draft 1" if i == 0 else f"draft {i + 1}, where all before it were accepted"


def table(deep: Json) -> Table:
    """A column a model."""
    models = model_rows(deep)
    rows = [
        [Cell("perplexity"), *(_figure(each.perplexity, ".3f") for each in models)],
        [Cell("change of perplexity"), *(_figure(each.perplexity_change, "+.2f", "%") for each in models)],
        [Cell("same most likely token"), *(percent(each.agreement) if each.agreement else NONE for each in models)],
        [Cell("KL divergence a token, nats"), *(_figure(each.kl, ".4f") for each in models)],
        *(
            [Cell(f"acceptance rate, {_draft(i)}"), *(percent(each.drafts[i]) for each in models)]
            for i in range(len(models[-1].drafts))
        ),
    ]
    if all(each.megabytes is not None for each in models):
        rows.append([Cell("size, MB"), *(number(each.megabytes, 1) for each in models)])
    note = (
        f"{text_line(deep)}. 95% intervals over sequences; forward passes of our own. A draft is accepted where the "
        "MTP block's greedy one is the token that the same model chooses itself."
    )
    heads = columns("<", *(each.name for each in models))
    return Table("prediction", "Prediction beside the source", heads, rows, note)
