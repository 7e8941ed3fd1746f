"""Runs the notebook docs/tour.ipynb, then builds the site of docs/ and README.md into scratch/site/ (`make docs`).

A cell that fails ends it, and so does a link that leads nowhere. Its environment, .venv-docs, has the tools of
docker/requirements-docs.txt, and by reference all of .venv; once it is there, no network is needed. What the notebook
shows is what it was last saved with: nothing of this run is kept, unless with --save.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

from scripts import env
from scripts.cli import parser_for, say
from v4forge.checkout import ROOT
from v4forge.errors import UserError, run_main

FOLDER, LOCK = ROOT / ".venv-docs", env.lock_file("docs")
SETTINGS, SITE, TOUR = "dev/site/mkdocs.yml", ROOT / "scratch/site", "docs/tour.ipynb"
# What mkdocs-material says of its future is for who changes the pin.
ADDED = {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
NBMAKE = ("-m", "pytest", "--nbmake", "--nbmake-timeout=300", "-q", "-p", "no:cacheprovider")
SAVING = ("-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--ExecutePreprocessor.record_timing=False")


def environment() -> Path:
    """The environment's Python, after building it anew where the lock, or the environment that it refers to, is
    another."""
    (base,) = (ROOT / ".venv").resolve().glob("lib/python3.*/site-packages")
    python, stamp = FOLDER / "bin/python", FOLDER / "lock.sha256"
    wanted = hashlib.sha256(LOCK.read_bytes() + f"{base} {sys.version}".encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    say(f"docs: building {FOLDER.name}")
    env.clear(FOLDER)
    venv.create(FOLDER, with_pip=True, symlinks=True)
    (packages,) = FOLDER.glob("lib/python3.*/site-packages")
    (packages / "v4forge.pth").write_text(f"{base}\n")
    pip = (*env.PIP_INSTALL, "--no-compile", "-qq", "--require-hashes", env.WHEELS_ONLY, "-r", LOCK)
    hint = "check the network, or point pip at a mirror (PIP_INDEX_URL, PIP_FIND_LINKS), then run: make docs"
    run(python, *pip, what=f"pip could not install {LOCK.relative_to(ROOT)}", hint=hint)
    stamp.write_text(wanted)
    return python


def run(*words: str | Path, what: str, hint: str) -> None:
    """Runs a program at the checkout; where it fails, UserError after what it said."""
    done = subprocess.run(words, cwd=ROOT, env=os.environ | ADDED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        raise UserError(f"{what} (above)", hint)


def main() -> None:
    parser = parser_for("docs_site", __doc__)
    parser.add_argument("--save", action="store_true", help=f"save {TOUR} with what this run shows")
    how = SAVING if parser.parse_args().save else NBMAKE
    python = environment()
    run(python, *how, TOUR, what=f"a cell of {TOUR} failed", hint="correct it, then: make docs")
    say(f"docs: {TOUR} runs")
    build = ("-m", "mkdocs", "build", "--strict", "--quiet", "-f", SETTINGS)
    run(python, *build, what="the site has faults", hint="correct the pages that are named, then: make docs")
    say(f"docs: {(SITE / 'index.html').as_uri()}")


if __name__ == "__main__":
    run_main(main)
