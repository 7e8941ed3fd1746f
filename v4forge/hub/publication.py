"""What of an artifact's folder is published, and why it may not be: every refusal comes before the network is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from v4forge import artifact_folder
from v4forge.artifact_folder import SIGNATURE, UNSUMMED
from v4forge.digests import HASH_THREADS, Digests
from v4forge.errors import UserError

# Beside what SHA256SUMS lists; what writes each.
WRITTEN_BY = {"SHA256SUMS": "make postprocess", "certificate.json": "make verify"}
CARD_COMMAND = "make card"
AGAIN = "make postprocess verify card"

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Member:
    """A file to publish. `size` in bytes, `sha256` in hex."""

    path: Path
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def git_sha1(self) -> str:
        """The name that git gives to these bytes; the hub knows small files by it."""
        digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()


def candidates(artifact: Path) -> list[Path]:
    """The files to publish, in name order; hidden ones are not.

    Raises UserError when the folder is no artifact, its certificate is missing, stale or failing, a file is missing,
    or there is one that no run wrote.
    """
    if not (artifact / "config.json").is_file():
        raise UserError(f"there is no artifact in {artifact}", "make artifact, or --artifact <its folder>")
    judged = artifact_folder.certificate_state(artifact)
    if judged.verdict not in ("ok", "changed"):
        raise UserError(judged.fact, "make verify")
    stated = artifact_folder.stated_sums(artifact, WRITTEN_BY[artifact_folder.SUMS])
    wanted = {*stated, *UNSUMMED}
    found = {path.name: path for path in artifact.iterdir() if not path.name.startswith(".")}
    for name in sorted(wanted - found.keys() - {SIGNATURE}):
        raise UserError(f"{artifact} has no {name}", _writer(name, stated))
    for name in sorted(found.keys() - wanted):
        raise UserError(f"{artifact / name} was written by no run of ours", f"mv {artifact / name} {artifact.parent}/")
    for name, path in sorted(found.items()):
        if not path.is_file():
            raise UserError(f"{path} is no file", _writer(name, stated))
    if judged.verdict == "changed":
        raise UserError(judged.fact, AGAIN)
    return [found[name] for name in sorted(found)]


def _writer(name: str, stated: Mapping[str, str]) -> str:
    return WRITTEN_BY.get(name, "make postprocess" if name in stated else CARD_COMMAND)


def unread(artifact: Path, digests: Digests) -> list[Path]:
    """The candidates whose digest no earlier stage has left, so that they have to be read."""
    return [path for path in candidates(artifact) if digests.known(path) is None]


def members(artifact: Path, digests: Digests, progress: Progress = lambda _read, _name: None) -> list[Member]:
    """What is published, by digest. Raises UserError as `candidates`, and for a file that is not SHA256SUMS's.

    progress gets the bytes that were read so far, of those of `unread`, and the file that is read next.
    """
    read = 0
    missing = unread(artifact, digests)
    for first in range(0, len(missing), HASH_THREADS):
        some = missing[first : first + HASH_THREADS]
        progress(read, some[0].name)
        digests.of(some)
        read += sum(path.stat().st_size for path in some)
    progress(read, "done")
    by_path = digests.of(candidates(artifact))
    digests.save()
    stated = artifact_folder.stated_sums(artifact, WRITTEN_BY[artifact_folder.SUMS])
    for path, digest in by_path.items():
        if stated.get(path.name, digest) != digest:
            raise UserError(f"{path} is not the file that {artifact_folder.SUMS} names", AGAIN)
    return [Member(path, path.stat().st_size, digest) for path, digest in by_path.items()]


@dataclass(frozen=True)
class Remote:
    """A file as the hub describes it: by `sha256` where it stores it as a large one, and by git's name of its bytes."""

    size: int
    git_sha1: str
    sha256: str | None = None

    def holds(self, member: Member) -> bool:
        """Whether its bytes are those of the local file."""
        if self.sha256 is not None:
            return self.sha256 == member.sha256
        return self.git_sha1 == member.git_sha1


def states(found: list[Member], remote: Mapping[str, Remote]) -> Iterator[tuple[Member, str]]:
    """Each file with what an upload would do: "new", "changed", or "there" for one that the hub has already."""
    for member in found:
        there = remote.get(member.name)
        yield member, "new" if there is None else "there" if there.holds(member) else "changed"
