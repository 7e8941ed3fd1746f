"""Runs the checks of checks.py on an artifact and writes what they found.

A statistical check says what is unlikely, not what is wrong. Where all else holds, above all that the codes and scales
are those that calibration recorded, and the whole model predicts as its source does over enough tokens, its failure is
a warning: see docs/verify.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from v4forge.artifact_folder import SUMS
from v4forge.checkpoint.reader import Checkpoint
from v4forge.digests import Digests
from v4forge.errors import UserError
from v4forge.files import remove_leftovers, write_json
from v4forge.model.evaluation import Quality
from v4forge.outcomes import WARNING, Outcome, failed, ok, warning
from v4forge.verification.checks import CHECKS, Check
from v4forge.verification.reference import CPU
from v4forge.verification.subject import Subject
from v4forge.verification.tolerances import ENOUGH_TOKENS

# what a check lacked -> why it was not run
LACKING = {
    "layout": "another tool's layout",
    "tensors": "the artifact cannot be opened",
    "source": "there is no --source to compare with",
    "hashes": "--no-hash left it out",
    "deep": "it needs --deep N or --tokens FILE",
}
DEEP = 8192  # tokens that a closer look begins with
LOST = {"layout": {"layout"}, "opens": {"tensors"}}  # what a failed check takes from those behind it
DECIDING = ("quality", "recorded", "provenance", "checksums")  # what has to be run and to hold against a statistic
RUNNABLE = ("tensors", "finite", "expert codes")  # what must hold before the artifact can predict anything


@torch.no_grad()
def verify(
    folder: Path,
    source: Checkpoint | None,
    digests: Digests,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
    expect: str = "",
    hashing: bool = True,
    compare: Callable[[Checkpoint, Checkpoint], Sequence[Quality]] | None = None,
    engine: str = "",
    recipe: str = "",
    device: torch.device = CPU,
) -> tuple[list[Outcome], dict[str, str], Sequence[Quality]]:
    """Runs every check that can run -> their outcomes, name -> why for those that were not run, what `compare` found.

    expect: a key of METHODS, how the routed experts must have been quantized; without it all layers alike. progress
    gets bytes of the artifact that were read, and of how many. compare: from source and artifact to their qualities,
    and those of others behind them; called once the artifact is known to be whole. engine: one of ENGINES, whose GPTQ
    it must be; recipe: one of RECIPES, by which it must be made. device: where matrices are compared. Raises UserError
    for a source whose config.json does not say what to expect.
    """
    if source is not None:
        source.config  # noqa: B018, reads and checks it
    subject = Subject(folder, source, digests, expect, engine, recipe, hashing, device, progress)
    lacking = {need for need, there in (("source", source), ("hashes", hashing), ("deep", compare)) if not there}
    outcomes: list[Outcome] = []
    not_run: dict[str, str] = {}
    for check in CHECKS:
        missing = [LACKING[need] for need in ("layout", *check.needs) if need in lacking]
        if "deep" in check.needs and not missing:
            missing = [f"{each.name} failed" for each in outcomes if each.name in RUNNABLE and not each.ok]
        if missing:
            not_run[check.name] = missing[0]
            continue
        if "deep" in check.needs and source and compare:
            subject = replace(subject, qualities=compare(source, subject.artifact))
        outcomes.append(_outcome(check, subject))
        if not outcomes[-1].ok:
            lacking |= LOST.get(check.name, set())
    return _weighed(outcomes, subject), not_run, subject.qualities


def _weighed(outcomes: list[Outcome], subject: Subject) -> list[Outcome]:
    """A failed statistic is a warning where everything else holds and the whole model was looked at."""
    doubtful = {check.name for check in CHECKS if check.statistical and check.name not in DECIDING}
    held = {each.name for each in outcomes if each.ok}
    tokens = subject.qualities[1].tokens if subject.qualities else 0
    others_hold = all(each.ok for each in outcomes if each.name not in doubtful)
    if tokens < ENOUGH_TOKENS or not others_hold or not held.issuperset(DECIDING):
        return outcomes
    why = f"over {tokens:,} tokens the model predicts as its source does, from the codes that calibration recorded"
    return [each if each.ok else warning(each.fact, why, each.name) for each in outcomes]


def _look_closer(subject: Subject) -> str:
    """The command that tells a fault from an unlikely artifact: more tokens than were looked at, if any were."""
    tokens = 4 * subject.qualities[1].tokens if subject.qualities else 0
    command = f"python -m scripts.verify --artifact {subject.folder}"
    if subject.source is not None:
        command += f" --source {subject.source.directory}"
        if not (subject.source.directory / "heldout.txt").is_file():
            command += " --heldout models/tiny/heldout.txt"
    if subject.recipe:
        command += f" --recipe {subject.recipe}"
    if subject.expect:
        command += f" --expect {subject.expect}"
    return f"{command} --deep {max(DEEP, tokens)}"


def _outcome(check: Check, subject: Subject) -> Outcome:
    """What was compared, or the first failures."""
    try:
        failures = list(check.function(subject))
    except UserError as error:
        failures = [f"{error.fact}: {error.hint}"]
    if not failures:
        return ok((check.function.__doc__ or "").splitlines()[0], check.name)
    more = f" … and {len(failures) - check.shown} more" if len(failures) > check.shown else ""
    fix = f"it may be honest, look closer: {_look_closer(subject)}" if check.statistical else ""
    return failed(";\n".join(failures[: check.shown]) + more, fix, check.name)


def content(
    artifact: Path,
    outcomes: Sequence[Outcome],
    not_run: dict[str, str],
    digests: Digests,
    deep: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What certificate.json says; it names SHA256SUMS by its digest. deep: figures."""
    sums = artifact / SUMS
    return {
        "ok": all(outcome.ok for outcome in outcomes),
        "sums_sha256": digests.of([sums])[sums] if sums.is_file() else None,
        "checks": [{"name": each.name, "ok": each.ok, "detail": _told(each)} for each in outcomes],
        "not_run": not_run,
    } | ({"deep": deep} if deep else {})


def write(path: Path, certificate: Mapping[str, Any]) -> None:
    """Writes a certificate. Raises UserError where nothing can be written."""
    remove_leftovers(path.parent)
    try:
        write_json(path, certificate)
    except UserError as error:
        hint = "the same command with --certificate FILE, or on a copy that you can write to"
        raise UserError(f"the certificate could go nowhere: {error.fact}", hint) from None


def _told(outcome: Outcome) -> str:
    return f"{WARNING}: {outcome.detail}" if outcome.status == WARNING else outcome.detail
