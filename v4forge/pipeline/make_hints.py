"""Commands of make for a work folder: the ones in a hint are of the defaults until they say which."""

from __future__ import annotations

from pathlib import Path

from v4forge import makefile
from v4forge.checkout import ROOT
from v4forge.pipeline.stages import PROFILES

DEFAULT_PROFILE, DEFAULT_SCRATCH = "tiny", ROOT / "scratch"


def for_work(hint: str, work: Path) -> str:
    """The hint, with PROFILE and SCRATCH in each command of make that reads them, where `work` is not the folder of
    make's defaults.

    A folder that is not named after a profile is none that make can be sent to: then the hint stays as it is.
    """
    if work.name not in PROFILES:
        return hint
    own = {"PROFILE": work.name} if work.name != DEFAULT_PROFILE else {}
    own |= {"SCRATCH": str(work.parent)} if work.absolute().parent != DEFAULT_SCRATCH else {}
    return makefile.completed(hint, own)
