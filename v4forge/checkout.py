"""Where the project's files are, and what git says of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

from v4forge.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def names(root: Path = ROOT) -> list[str]:
    """The files below `root` that git tracks or would track, sorted; no build output, nothing ignored, no link."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=root,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        raise UserError("git is not installed", "apt-get install git") from None
    if done.returncode:
        raise UserError(f"{root} is not a git checkout: {done.stderr.strip()}", "git clone the repository")
    found = {name for name in done.stdout.split("\0") if name}
    return sorted(name for name in found if (root / name).is_file() and not (root / name).is_symlink())


def revision(*status: str, root: Path = ROOT) -> str | None:
    """The commit that is checked out, with -dirty where `git status` with these options names a change; None where git
    does not tell."""
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", *status])
    try:
        done = [subprocess.run(["git", *command], cwd=root, capture_output=True, text=True) for command in commands]
    except FileNotFoundError:
        return None
    if any(result.returncode for result in done):
        return None
    commit, changes = (result.stdout.strip() for result in done)
    return f"{commit}-dirty" if changes else commit
