"""What a run of stages would do, and why: for `make why` and DRY_RUN=1. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from v4forge.pipeline.runner import Runner, listed
from v4forge.pipeline.stages import FILES


def why(runner: Runner, name: str) -> list[str]:
    """Lines that say whether the stage would run and why, after the first earlier stage that would."""
    for earlier in runner.table[name].after:
        lines = why(runner, earlier)
        if not lines[-1].endswith(" is up to date"):
            last = f"{name} would run after {lines[-1].split(' would run')[0]}"
            return [*lines, last] if not runner.own_reasons(name) else [*lines, _line(runner, name)]
    return [_line(runner, name)]


def _line(runner: Runner, name: str) -> str:
    reasons = runner.own_reasons(name)
    return f"{name} would run: {listed(reasons)}" if reasons else f"{name} is up to date"


def dry_run(runner: Runner, names: Sequence[str]) -> list[str]:
    """Lines that say what a run of these stages would do, in order: each stage, why, and its command."""
    lines: list[str] = []
    before = ""  # the last stage that would run
    for name in names:
        if skipped := runner.skipped(name):
            lines.append(f"{name}: {skipped}")
            continue
        stage = runner.table[name]
        groups = [group for group in runner.files(stage.inputs) if group.name not in stage.optional]
        missing = [group.path for group in groups if not group.members()]
        reasons = [] if missing else runner.reasons(name, runner.record(name))
        if before and stage.after:
            reasons = reasons or [f"after {before}"]
        if missing and not before:
            reasons = [f"it needs {missing[0]}: {_maker_of(runner, missing[0])}"]
        if not reasons:
            lines.append(f"{name}: up to date")
            continue
        before = name
        lines += [f"{name}: would run ({listed(reasons)})", f"    {runner.shown_command(name)}"]
    return lines


def _maker_of(runner: Runner, path: Path) -> str:
    return next(runner.maker(group.name) for group in runner.files(list(FILES)) if group.path == path)
