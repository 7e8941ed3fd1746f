"""Whether a stage is up to date, by content: what it read, was told, ran and wrote, each by digest and not by time.

A stage that succeeds leaves a stamp, `<work>/.stamps/<stage>.json`, with a record of these components. It is up to date
while a record made now says the same and its outputs still have the digests of the stamp.
"""

from __future__ import annotations

import ast
import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge.digests import Digests
from v4forge.files import write_json

Record = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Files:
    """A file, or all files below a folder, that a stage reads or writes.

    `name` stands for the path in records, so that moving a folder changes nothing. Hidden and partial files, and those
    matching a pattern of `without`, are not part of it.
    """

    name: str
    path: Path
    without: tuple[str, ...] = ()

    def members(self) -> dict[str, Path]:
        """label -> path, empty when the path does not exist."""
        if self.path.is_file():
            return {self.name: self.path}
        return {f"{self.name}/{path.relative_to(self.path).as_posix()}": path for path in self._walk()}

    def _walk(self) -> Iterator[Path]:
        for folder, folders, files in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                if not any(fnmatch.fnmatch(name, pattern) for pattern in (".*", "*.tmp", *self.without)):
                    yield Path(folder, name)


def digests_of(files: Sequence[Files], digests: Digests) -> dict[str, str]:
    """label -> sha256 of every member."""
    members = {label: path for group in files for label, path in group.members().items()}
    by_path = digests.of(list(members.values()))
    return {label: by_path[path] for label, path in members.items()}


def code_closure(module: str, root: Path) -> list[Path]:
    """The project's files that importing `module` can run: its own, and all that it imports from below `root`.

    Found by reading import statements, those inside functions too; names computed at run time are not seen.
    """
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        path = _module_file(name, root)
        if path is None or name in found:
            continue
        found[name] = path
        pending += [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_bytes(), filename=str(path))):
            if isinstance(node, ast.Import):
                pending += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                pending += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return sorted(set(found.values()))


def _module_file(name: str, root: Path) -> Path | None:
    path = root.joinpath(*name.split("."))
    candidates = (path.with_name(path.name + ".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def record(
    *,
    command: Sequence[str],
    settings: Mapping[str, Any],
    pins: Mapping[str, str],
    inputs: Sequence[Files],
    code: Sequence[Path],
    root: Path,
    digests: Digests,
) -> Record:
    """What decides a stage's outputs, as it is now. `command` is the template, without paths."""
    code_digests = digests.of(list(code))
    return {
        "command": {"template": list(command)},
        "settings": dict(settings),
        "pins": dict(pins),
        "input": digests_of(inputs, digests),
        "code": {path.relative_to(root).as_posix(): code_digests[path] for path in code},
    }


def differences(stamp: Record, now: Record, outputs: Sequence[Files], digests: Digests) -> list[str]:
    """Why a stage with this stamp has to run again; empty when it is up to date."""
    if not stamp:
        return ["it has not run yet"]
    reasons = []
    for kind, singular in (("settings", "setting"), ("pins", "pin")):
        before, after = stamp.get(kind, {}), now[kind]
        reasons += [
            f"{singular} {key} was {_shown(before.get(key))}, is {_shown(after.get(key))}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
    for kind in ("input", "code"):
        reasons += [f"{kind} {change}" for change in _changes(stamp.get(kind, {}), now[kind], "is gone", "is new")]
    if stamp.get("command") != now["command"]:
        reasons.append("its command line changed")
    # Files that another stage adds to an output folder are no reason: only what this stage wrote counts.
    recorded = stamp.get("output", {})
    members = {label: path for group in outputs for label, path in group.members().items() if label in recorded}
    by_path = digests.of(list(members.values()))
    current = {label: by_path[path] for label, path in members.items()}
    reasons += [f"output {change}" for change in _changes(recorded, current, "missing", "is new")]
    return reasons


def _changes(before: Mapping[str, str], after: Mapping[str, str], gone: str, new: str) -> Iterator[str]:
    for label in sorted(before.keys() | after.keys()):
        if label not in after:
            yield f"{label} {gone}"
        elif label not in before:
            yield f"{label} {new}"
        elif before[label] != after[label]:
            yield f"{label} changed"


def _shown(value: Any) -> str:
    return "unset" if value in (None, "") else str(value)


def seal(path: Path, now: Record, outputs: Sequence[Files], digests: Digests) -> None:
    """Writes the stamp of a stage that succeeded. `now` is the record made before it ran."""
    write_json(path, {**now, "output": digests_of(outputs, digests)})
