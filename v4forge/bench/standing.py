"""What a bench's result file is worth: whether it is of the model and machine that the published figures are of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What the published figures are of: DeepSeek-V4-Flash on H200. GH200 is another machine.
FLASH = {"num_hidden_layers": 43, "hidden_size": 4096, "n_routed_experts": 256}
H200 = re.compile(r"\bH200\b")


@dataclass(frozen=True)
class Worth:
    """What a result is worth: `marks` are said wherever its figures are; without any it is a result on what the
    published figures are of."""

    trial: int | None
    model: str  # what is measured, '' where it is Flash
    machine: str  # on what, '' where it is H200
    complete: bool
    other: str = ""  # of which artifact, '' where it is the one that is reported on

    @property
    def comparable(self) -> bool:
        """Whether a test against the published figures says something."""
        return self.trial is None and self.published_model

    @property
    def published_model(self) -> bool:
        """Whether the figures may stand beside the published ones at all, a trial marked as one."""
        return not (self.model or self.machine or self.other)

    @property
    def marks(self) -> list[str]:
        marks = [f"not of this artifact but of {self.other}"] if self.other else []
        if self.model and self.machine:
            marks.append(f"{self.model} on {self.machine}: a test of the bench, not a result")
        elif self.model:
            marks.append(f"{self.model}: a test of the bench, not a result")
        elif self.machine:
            marks.append(f"on {self.machine}, where nothing was published: not comparable")
        if self.trial is not None:
            marks.append(f"a trial of {self.trial}: not a result")
        return marks

    @property
    def short(self) -> str:
        """The marks for a table's cell."""
        where = " on ".join(part for part in (self.model, self.machine) if part)
        trial = f"a trial of {self.trial}" if self.trial is not None else ""
        return "; ".join(part for part in (self.other, where, trial) if part)


def worth_of(result: Mapping[str, Any]) -> Worth:
    """What a result file's figures are worth. Raises KeyError for a key that it lacks."""
    artifact = result["target"].get("artifact") or {}
    size = {name: artifact.get(name) for name in FLASH}
    if size == FLASH:
        model = ""
    elif not all(isinstance(value, int) for value in size.values()):
        model = "a model of unknown size"
    elif int(size["hidden_size"] or 0) < FLASH["hidden_size"] / 4:
        model = "tiny model"
    else:
        model = "another model"
    gpus = result["machine"].get("gpus") or []
    if gpus and all(H200.search(name) for name in gpus) and result["target"].get("backend") != "cpu":
        machine = ""
    else:
        machine = f"{len(gpus)} x {gpus[0]}" if gpus and result["target"].get("backend") != "cpu" else "a CPU"
    return Worth(result.get("trial"), model, machine, result["complete"] is True)
