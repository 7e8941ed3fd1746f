"""Where the project's files are, and what git says of them."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from v4forge.errors import UserError

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
# What an installed package holds of the project's other files: pyproject.toml lists them.
HELD = PACKAGE / "checkout_files"
INSTALLED = HELD.is_dir()


def file(name: str) -> Path:
    """A file of the project by its name there: in the checkout, or the copy that an installed package holds."""
    return (HELD if INSTALLED else ROOT) / name


@dataclass(frozen=True)
class Told:
    """What git answers: a revision, or why there is none."""

    revision: str | None
    why: str = ""


def git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """How a command of git ends in `root`. UserError without git.

    Variables of another repository, which a hook of git sets say, are not for it. Who owns the checkout does not matter
    for reading it: its programs run already.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-c", f"safe.directory={root.resolve()}", *words]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, errors="replace", env=environment)
    except FileNotFoundError:
        raise UserError("git is not installed", "apt-get install git") from None


def names(root: Path = ROOT) -> list[str]:
    """The files below `root` that git tracks or would track, sorted; no build output, nothing ignored, no link."""
    done = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if done.returncode:
        raise UserError(f"{root} is not a git checkout: {done.stderr.strip()}", "git clone the repository")
    found = {name for name in done.stdout.split("\0") if name}
    return sorted(name for name in found if (root / name).is_file() and not (root / name).is_symlink())


def revision(*status: str, root: Path = ROOT) -> str | None:
    """The commit that is checked out, with -dirty where `git status` with these options names a change; None where git
    does not tell."""
    return told(*status, root=root).revision


def told(*status: str, root: Path = ROOT) -> Told:
    """The same, and why git does not tell."""
    try:
        done = [git(root, *command) for command in (["rev-parse", "HEAD"], ["status", "--porcelain", *status])]
    except UserError as error:
        return Told(None, error.fact)
    for result in done:
        if result.returncode:
            return Told(None, (result.stderr.strip().splitlines() or ["git failed"])[0])
    commit, changes = (result.stdout.strip() for result in done)
    return Told(f"{commit}-dirty" if changes else commit)
