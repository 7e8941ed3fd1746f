"""Our GPTQ beside another implementation of it: what verification.engines found, as a table and sentences.

Pure functions of reports/engines.json; a key that it lacks is a KeyError, and the caller knows the file.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from v4forge.reporting.tables import Cell, Json, Table, columns, number
from v4forge.verification.tolerances import REPLAY_EQUAL_CODES, REPLAY_LOSS_OFF


@dataclass(frozen=True)
class Row:
    """One layer by both. Losses in percent of output energy, means over its matrices."""

    layer: int
    equal_codes: float  # share
    identical: int  # matrices, with their scales
    matrices: int
    ours: float
    theirs: float

    @property
    def off(self) -> float:
        """Relative difference of their loss from ours."""
        return self.theirs / self.ours - 1 if self.ours else 0.0

    @property
    def near(self) -> bool:
        """Whether they differ by no more than one implementation may, repeated on other hardware."""
        return self.equal_codes >= REPLAY_EQUAL_CODES and abs(self.off) <= REPLAY_LOSS_OFF


def rows(found: Json) -> list[Row]:
    """By layer number."""
    made = [
        Row(each["layer"], each["equal_codes"], each["identical"], each["matrices"], *(100 * v for v in each["loss"]))
        for each in found["layers"]
    ]
    return sorted(made, key=lambda row: row.layer)


def names(found: Json) -> tuple[str, str]:
    """Both, with the version of what is not our own."""
    ours, theirs = (f"{each['made']} {each['version'] or ''}".rstrip() for each in found["engines"])
    return ours, theirs


def _share(value: float) -> str:
    """A share that is called 100% only where it is."""
    return ">99.99%" if 0.99995 <= value < 1 else f"{value:.2%}"


def said(found: Json) -> list[str]:
    """What the table comes to, in sentences."""
    layers = rows(found)
    ours, theirs = names(found)
    equal = statistics.fmean(row.equal_codes for row in layers)
    losses = [statistics.fmean(getattr(row, side) for row in layers) for side in ("ours", "theirs")]
    off = losses[1] / losses[0] - 1 if losses[0] else 0.0
    same, matrices = sum(row.identical for row in layers), sum(row.matrices for row in layers)
    sentences = [
        f"{_share(equal)} of the codes of {ours} and of {theirs} are equal, and {same:,} of {matrices:,} matrices to "
        f"the last bit. {ours} loses {losses[0]:.4f}% of the experts' output energy, {theirs} {losses[1]:.4f}%, "
        f"{off:+.2%}."
    ]
    bounds = f"{REPLAY_EQUAL_CODES:.0%} equal codes, losses within {REPLAY_LOSS_OFF:.0%}"
    if far := [str(row.layer) for row in layers if not row.near]:
        sentences.append(
            f"Further apart than one of them, repeated on other hardware, may be ({bounds}): layers {', '.join(far)}."
        )
    else:
        sentences.append(f"Each layer is as near as one of them, repeated on other hardware, has to be: {bounds}.")
    if found["differing"]:
        sentences.append(f"They differ in more than whose GPTQ it is: {', '.join(found['differing'])}.")
    if len(set(found["hardware"])) > 1:
        sentences.append("One on {}, the other on {}.".format(*found["hardware"]))
    return sentences


def table(found: Json) -> Table:
    """A row a layer."""
    ours, theirs = names(found)
    lines = []
    for row in rows(found):
        mark = "" if row.near else "bad"
        lines.append(
            [
                Cell(str(row.layer)),
                Cell(_share(row.equal_codes), mark=mark if row.equal_codes < REPLAY_EQUAL_CODES else ""),
                Cell(f"{row.identical:,} of {row.matrices:,}"),
                number(row.ours, 4),
                number(row.theirs, 4),
                Cell(f"{row.off:+.2%}", mark=mark if abs(row.off) > REPLAY_LOSS_OFF else ""),
            ]
        )
    heads = columns("<layer", "equal codes", "identical matrices", f"{ours}, %", f"{theirs}, %", "difference")
    note = (
        "Losses as above. A code near a tie falls one way or the other as products round, and all behind it in its row "
        "follow; what one layer became is what the next is calibrated on."
    )
    return Table("engines", "Two implementations of GPTQ", heads, lines, note)
