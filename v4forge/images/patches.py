"""Patches of the projects that an image is built from: patches/<project>/series and the files it names.

A patch is metadata, then a unified diff. It states the sha256 of every file before and after it, and is applied only
where the first one holds, without fuzz and without an offset; all patches of a series, or none. Standard library only.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from v4forge.checkout import ROOT
from v4forge.errors import UserError

FOLDER = ROOT / "patches"
FIELDS = ("purpose", "upstream", "drop-when", "check")
_FIELD = re.compile(r"([a-z-]+): +(\S.*(?:\n +\S.*)*)\n?")
_FILE = re.compile(r"(\S+) sha256:([0-9a-f]{64})")


@dataclass(frozen=True)
class Patch:
    """One patch file. `before` and `after`: path in the project -> sha256 in hex; `check`: its function in check.py."""

    file: Path
    purpose: str
    upstream: str
    drop_when: str
    check: str
    before: dict[str, str]
    after: dict[str, str]

    @property
    def name(self) -> str:
        return self.file.stem


def parse(file: Path) -> Patch:
    """Raises UserError for a patch without its metadata, or whose metadata and diff name different files."""
    text = file.read_text(encoding="utf-8")
    head, _, diff = text.partition("\n--- ")
    fields: dict[str, str] = {}
    files: dict[str, dict[str, str]] = {"applies-to": {}, "gives": {}}
    for match in _FIELD.finditer(head):
        key, value = match[1], " ".join(match[2].split())
        if key not in files:
            fields[key] = value
        elif (stated := _FILE.fullmatch(value)) is None:
            raise UserError(f"{file.name}: {key} is not a path and sha256:<hex>: {value}", f"correct {file}")
        else:
            files[key][stated[1]] = stated[2]
    if missing := [key for key in FIELDS if not fields.get(key)]:
        raise UserError(f"{file.name} does not state its {missing[0]}", f"add a line `{missing[0]}: …` to {file}")
    changed = set(re.findall(r"^\+\+\+ b/(\S+)", diff, flags=re.M))
    if not changed or not changed == files["applies-to"].keys() == files["gives"].keys():
        raise UserError(f"{file.name} does not state applies-to and gives of the files it changes", f"correct {file}")
    if outside := [path for path in changed if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts]:
        raise UserError(f"{file.name} changes {outside[0]}, outside of the project", f"correct {file}")
    return Patch(
        file=file,
        purpose=fields["purpose"],
        upstream=fields["upstream"],
        drop_when=fields["drop-when"],
        check=fields["check"],
        before=files["applies-to"],
        after=files["gives"],
    )


def series(project: str, folder: Path = FOLDER) -> list[Patch]:
    """The patches of a project in their order. UserError for a project or patch that is not there, or in no series."""
    listing = folder / project / "series"
    if not listing.is_file():
        known = ", ".join(sorted(path.parent.name for path in folder.glob("*/series")))
        raise UserError(f"there is no {listing}", f"projects with patches: {known}")
    lines = [line.split("#")[0].strip() for line in listing.read_text(encoding="utf-8").splitlines()]
    names = [line for line in lines if line]
    present = {path.name for path in listing.parent.glob("*.patch")}
    if odd := sorted(present.symmetric_difference(names)) or [name for name in names if names.count(name) > 1]:
        raise UserError(f"{listing} and the patches beside it disagree about {odd[0]}", f"correct {listing}")
    return [parse(listing.parent / name) for name in names]


def apply(patches: Collection[Patch], tree: Path) -> list[str]:
    """Applies patches to `tree`, an installed site-packages or a source checkout; the paths that changed.

    Raises UserError, with the tree as it was, when a file is not what a patch applies to, and when the patch program
    would have to guess. The RECORD of the distribution that a file belongs to states the new file.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for patch in patches:
            for path, sha256 in patch.before.items():
                if not (scratch / path).exists():
                    _copy(tree, path, scratch, patch)
                _expect_base(patch, path, sha256, scratch / path)
            _run(patch, scratch, dry=True)
            _run(patch, scratch, dry=False)
            for path, sha256 in patch.after.items():
                if (found := _sha256(scratch / path)) != sha256:
                    raise UserError(
                        f"{patch.name} makes of {path} sha256 {found}, not what it states", f"correct {patch.file}"
                    )
        changed = sorted({path for patch in patches for path in patch.after})
        for path in changed:
            _replace(scratch / path, tree / path)
    _record(tree, changed)
    return changed


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _copy(tree: Path, path: str, scratch: Path, patch: Patch) -> None:
    if not (tree / path).is_file():
        raise UserError(f"{patch.name} changes {path}, which {tree} does not have", "give the folder above the package")
    (scratch / path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(tree / path, scratch / path)


def _expect_base(patch: Patch, path: str, sha256: str, file: Path) -> None:
    found = _sha256(file)
    if found == patch.after[path]:
        raise UserError(f"{patch.name} is already applied to {path}", f"leave it out: --skip {patch.name}")
    if found != sha256:
        raise UserError(
            f"{patch.name} applies to another {path}: sha256 {found[:12]}… here, {sha256[:12]}… stated",
            f"drop it when {patch.drop_when}; else write it anew for this version in {patch.file}",
        )


def _run(patch: Patch, folder: Path, dry: bool) -> None:
    command = ["patch", "--strip=1", "--fuzz=0", "--batch", "--forward", "--reject-file=-", "--no-backup-if-mismatch"]
    if dry:
        command.append("--dry-run")
    try:
        done = subprocess.run(
            [*command, f"--input={patch.file.resolve()}"], cwd=folder, capture_output=True, text=True, env=_ENVIRONMENT
        )
    except FileNotFoundError:
        raise UserError("there is no program patch", "apt-get install patch") from None
    said = done.stdout + done.stderr
    if done.returncode or re.search(r"\b(fuzz|offset|FAILED|Reversed)\b", said):
        raise UserError(f"{patch.name} does not apply as it is: {' '.join(said.split())}", f"correct {patch.file}")


_ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _replace(source: Path, target: Path) -> None:
    """Puts a file in the place of another, never into it: an installer may have linked that one from its cache."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.copyfile(source, temporary)
    shutil.copymode(target, temporary)
    os.replace(temporary, target)
    for stale in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
        stale.unlink()


def _record(tree: Path, paths: Collection[str]) -> None:
    """Writes sha256 and size of `paths` into the RECORD that lists them; a source checkout has none."""
    for record in sorted(tree.glob("*.dist-info/RECORD")):
        with open(record, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if not any(row and row[0] in paths for row in rows):
            continue
        stated = [[row[0], *_entry(tree / row[0])] if row and row[0] in paths else row for row in rows]
        temporary = record.with_name(f".RECORD.{os.getpid()}.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(stated)
        os.replace(temporary, record)


def _entry(path: Path) -> list[str]:
    """sha256 and size of a file in the form of a RECORD (PEP 376, PEP 427)."""
    content = path.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [f"sha256={digest}", str(len(content))]
