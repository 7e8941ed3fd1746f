"""What there is to report on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from v4forge.reporting.benches import Told
from v4forge.reporting.beside import Beside, beside
from v4forge.reporting.tables import Json


@dataclass(frozen=True)
class Inputs:
    """What a work folder holds; what was not made yet is None or empty."""

    certificate: Json | None = None
    layers: Sequence[Json] = ()
    run: Json = field(default_factory=dict)
    manifest: Json | None = None
    benches: Mapping[str, Told] = field(default_factory=dict)
    baseline: Mapping[str, Told] = field(default_factory=dict)  # of another checkpoint, served alike
    engines: Json | None = None  # another implementation of GPTQ beside this one
    price: float | None = None  # of an hour of the machine, in any currency
    profile: str = ""  # what the work folder is called
    sums: str | None = None  # sha256 of the artifact's SHA256SUMS
    config: Json = field(default_factory=dict)  # the artifact's config.json
    pages: Sequence[str] = ()  # the files of header.PAGES that there are

    @cached_property
    def beside(self) -> Beside | None:
        """The artifact beside the baseline."""
        return beside(self.ours, self.baseline)

    @property
    def ours(self) -> dict[str, Told]:
        """The benches of the artifact that is reported on."""
        return {name: told for name, told in self.benches.items() if not told.other}

    @property
    def deep(self) -> Json | None:
        """The figures of verify --deep."""
        found: Json | None = (self.certificate or {}).get("deep")
        return found
