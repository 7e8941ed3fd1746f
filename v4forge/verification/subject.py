"""What verify looks at: an artifact, its source, and what was read of both, once, whichever checks ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from v4forge.artifact_folder import MANIFEST
from v4forge.checkpoint.layout import Config
from v4forge.checkpoint.reader import Checkpoint
from v4forge.digests import Digests
from v4forge.files import read_json
from v4forge.model.evaluation import Quality
from v4forge.verification.reference import CPU, Matrix
from v4forge.verification.scan import Seen, scan

Failures = Iterator[str]  # what a check yields, a line each


@dataclass(frozen=True)
class Subject:
    """What is verified, and against what."""

    folder: Path
    source: Checkpoint | None
    digests: Digests
    expect: str = ""  # a key of METHODS, or "" where either will do
    engine: str = ""  # one of ENGINES whose GPTQ it must be, or "" where any will do
    recipe: str = ""  # one of RECIPES by which it must be made, or "" where any will do
    hashing: bool = True
    device: torch.device = CPU
    progress: Callable[[int, int], None] = lambda _done, _of: None
    qualities: Sequence[Quality] = ()  # the source's and the artifact's, of --deep; then those of others beside them

    @cached_property
    def artifact(self) -> Checkpoint:
        return Checkpoint(self.folder, form="artifact")

    @property
    def config(self) -> Config:
        return self.artifact.config

    @cached_property
    def seen(self) -> list[Seen]:
        """Every tensor as it is, beside its source; read once, whichever checks ask."""
        return scan(self.artifact, self.source, self.digests if self.hashing else None, self.progress, self.device)

    @property
    def experts(self) -> list[tuple[Seen, Matrix]]:
        """The routed experts' matrices that could be read."""
        return [(each, each.expert) for each in self.seen if each.expert]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / MANIFEST)
