"""Checks, offline, that locks, Dockerfiles, compose files, workflows and docs agree with versions.env."""

from __future__ import annotations

from v4forge.errors import Parser, UserError, run_main
from v4forge.images import lock_check


def main() -> None:
    Parser(
        prog="python -m dev.lock_check",
        description="\n".join([__doc__ or "", "", *(f"  {check.__doc__}" for check in lock_check.CHECKS)]),
    ).parse_args()
    project = lock_check.read()
    problems = lock_check.problems(project)
    for fact in problems:
        print(fact)
    if problems:
        raise UserError(f"{len(problems)} lines disagree with versions.env (above)", "correct them; locks: make lock")
    print(f"lock-check: {len(lock_check.CHECKS)} checks of {len(project.files)} files, {len(project.pins)} pins: ok")


if __name__ == "__main__":
    run_main(main)
