"""A folder as a source of files, without a network: a download of `hf download --local-dir`, a snapshot of the hub's
cache, or any folder that holds a checkpoint.

The first two know the hub's hash of each file: from `.cache/huggingface/download/<name>.metadata`, whose second line is
the hub's tag of the file, or from the name of the blob that a snapshot's link leads to. Of a plain folder only the
structure can be checked.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from v4forge.checkpoint.incoming import Expected
from v4forge.errors import UserError

DOWNLOADS = Path(".cache", "huggingface", "download")
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass
class FolderSource:
    """A folder that was looked at. `form` says what it is; repo and revision are None where it does not."""

    folder: Path
    form: str
    repo: str | None
    revision: str | None
    files: list[Expected]
    paths: dict[str, Path] = field(default_factory=dict)  # name -> the file itself, not a link to it

    attempts = 1  # a file that is damaged stays so

    def listing(self) -> list[Expected]:
        return self.files

    def blame(self, name: str, fault: str) -> UserError:
        """The error for a file that is not what the hub has."""
        words = ["hf", "download", self.repo or "<repository>", name, "--revision", str(self.revision)]
        where = {
            "download": ["--local-dir", str(self.folder)],
            "snapshot": ["--cache-dir", str(self.folder.parents[2 if self.repo else 0])],
        }.get(self.form)
        again = f"copy it to {self.folder} again"
        if where is not None:
            again = shlex.join([*words, "--force-download", *where])
        return UserError(f"{self.folder / name} is damaged: {fault}", again)


def looked_at(folder: Path, repo: str, revision: str) -> FolderSource:
    """What a folder offers. Raises UserError when there is none, or when it says that it holds another revision."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "make fetch PROFILE=flash FROM=<a folder with a checkpoint>")
    if (folder / "snapshots").is_dir():
        folder = folder / "snapshots" / revision
        if not folder.is_dir():
            held = sorted(each.name for each in folder.parent.iterdir())
            raise UserError(
                f"{folder.parent} holds no {revision}", f"pass --revision {held[0] if held else '<commit>'}"
            )
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(_walk(folder))}
    tags = {name: tag for name, path in paths.items() if (tag := _blob_tag(path))}
    if tags:
        owner = re.fullmatch(r"models--(.+?)--(.+)", folder.parent.parent.name)
        found = FolderSource(folder, "snapshot", f"{owner[1]}/{owner[2]}" if owner else None, folder.name, [])
    elif tags := {name: tag for name in paths if (tag := _download_tag(folder, name))}:
        commits = {_download_commit(folder, name) for name in tags}
        if len(commits) > 1:
            again = f"hf download {repo} --revision {revision} --local-dir {folder}"
            raise UserError(f"{folder} holds files of several revisions", again)
        found = FolderSource(folder, "download", repo, commits.pop(), [])
    else:
        found = FolderSource(folder, "plain", None, None, [])
    if found.revision is not None and found.revision != revision:
        hint = f"python -m scripts.fetch --revision {found.revision} …, if that is the one you mean"
        raise UserError(f"{folder} holds revision {found.revision}, not {revision}", hint)
    for name, path in paths.items():
        tag = tags.get(name)
        if tag is None and found.form != "plain":
            continue  # somebody's own file, or half a download
        real = path.resolve()
        sha256, git_sha1 = (tag, None) if tag and len(tag) == 64 else (None, tag)
        found.files.append(Expected(name, real.stat().st_size, sha256, git_sha1))
        found.paths[name] = real
    return found


def _walk(folder: Path) -> list[Path]:
    """The files that have a name of their own: neither hidden nor half written."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(root, name) for name in names if not name.startswith(".") and not name.endswith(".tmp"))
        found += [path for path in paths if path.is_file()]
    return found


def _blob_tag(path: Path) -> str | None:
    """The hash that names the blob behind a snapshot's link."""
    if not path.is_symlink():
        return None
    target = Path(os.readlink(path))
    return target.name if target.parent.name == "blobs" and HASH.fullmatch(target.name) else None


def _metadata(folder: Path, name: str) -> list[str]:
    try:
        return (folder / DOWNLOADS / f"{name}.metadata").read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return []


def _download_tag(folder: Path, name: str) -> str | None:
    lines = _metadata(folder, name)
    return lines[1] if len(lines) > 1 and HASH.fullmatch(lines[1]) else None


def _download_commit(folder: Path, name: str) -> str | None:
    lines = _metadata(folder, name)
    return lines[0] if lines and COMMIT.fullmatch(lines[0]) else None
