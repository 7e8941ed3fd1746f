"""Applies the patches in patches/ to an installed package or a source checkout, and checks that they work.

python -m scripts.patch list vllm
python -m scripts.patch apply vllm --tree /opt/venv/lib/python3.12/site-packages
python -m scripts.patch check vllm --python /opt/venv/bin/python

`check` runs patches/<project>/check.py with the interpreter that the project is installed for: it calls what the
patches and the plugin change. Standard library only: it runs while an image is built.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from v4forge.errors import Parser, UserError, run_main
from v4forge.images import patches
from v4forge.images.patches import Patch


def chosen(project: str, skip: Sequence[str]) -> list[Patch]:
    """The series without the patches named in `skip`."""
    found = patches.series(project)
    names = [patch.name for patch in found]
    skip = " ".join(skip).split()
    if unknown := [name for name in skip if name not in names]:
        raise UserError(f"{project} has no patch {unknown[0]}", f"--skip takes: {', '.join(names)}")
    return [patch for patch in found if patch.name not in skip]


def show(found: Sequence[Patch]) -> None:
    for patch in found:
        print(f"{patch.name}\n  {patch.purpose}\n  upstream: {patch.upstream}\n  dropped when {patch.drop_when}")
        for path, sha256 in patch.before.items():
            print(f"  applies to {path} sha256 {sha256}")


def check(project: str, found: Sequence[Patch], python: str) -> None:
    """Runs check.py; UserError when the interpreter is missing or a check fails, after its own output."""
    program = patches.FOLDER / project / "check.py"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run([python, program, *(patch.check for patch in found)], env=environment)
    except OSError as error:
        raise UserError(f"cannot run {python}: {error.strerror}", "--python takes a Python interpreter") from None
    if done.returncode:
        raise UserError(
            f"{project} in {python} does not behave as patched (above)", f"python -m scripts.patch list {project}"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m scripts.patch", description=__doc__)
    parser.add_argument("action", choices=("list", "apply", "check"))
    parser.add_argument("project", help="a folder of patches/ with a series")
    parser.add_argument("--tree", type=Path, help="apply: the folder above the package, or the top of its source")
    parser.add_argument("--python", default=sys.executable, help="check: the interpreter (default: this one)")
    parser.add_argument("--skip", action="append", default=[], metavar="NAMES", help="patches to leave out")
    args = parser.parse_args(argv)
    if args.action == "apply" and args.tree is None:
        parser.error("apply needs --tree")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    found = chosen(args.project, args.skip)
    if args.action == "list":
        show(found)
    elif args.action == "check":
        check(args.project, found, args.python)
    else:
        for path in patches.apply(found, args.tree):
            print(f"patch: {path}")
        print(f"patch: {len(found)} applied to {args.tree}")


if __name__ == "__main__":
    run_main(main)
