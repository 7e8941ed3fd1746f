"""Commands of make for a work folder: the ones in a hint are of the defaults until they say which."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from v4forge.checkout import ROOT
from v4forge.pipeline.stages import PROFILES

DEFAULT_PROFILE, DEFAULT_SCRATCH = "tiny", ROOT / "scratch"
# Targets that work in SCRATCH/PROFILE and make what an artifact or a report is made of.
TARGETS = "artifact|fetch|calibrate|postprocess|verify|card|report|bench(?:-[a-z]+)?"
COMMAND = re.compile(rf"\bmake(?: (?:{TARGETS})(?![\w-]))+")


def for_work(hint: str, work: Path) -> str:
    """The hint, with PROFILE and SCRATCH in each command of make where `work` is not the folder of make's defaults.

    A folder that is not named after a profile is none that make can be sent to: then the hint stays as it is.
    """
    if work.name not in PROFILES:
        return hint
    settings = [f"PROFILE={work.name}"] if work.name != DEFAULT_PROFILE else []
    if work.absolute().parent != DEFAULT_SCRATCH:
        settings.append(f"SCRATCH={shlex.quote(str(work.parent))}")
    return COMMAND.sub(lambda found: " ".join([found[0], *settings]), hint)
