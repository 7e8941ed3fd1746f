"""The artifact folder: what its files are called, which of them SHA256SUMS covers, what its certificate says of them,
and whether they are still those, by name and size.

Serving, publishing, releasing and the reports ask it. Standard library only: it is read where there is no torch.
`certified` also reads the shards.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4forge.errors import UserError
from v4forge.files import read, read_json

FORMAT = 2  # of the manifest
MANIFEST, SUMS, CARD, RUN, CERTIFICATE = "manifest.json", "SHA256SUMS", "README.md", "run.json", "certificate.json"
SIGNATURE = "certificate.sig.json"  # where somebody has signed it
UNSUMMED = (SUMS, CERTIFICATE, SIGNATURE, CARD, RUN)  # written after the sums, or holding them
SHARD = ".safetensors"  # the files that take long to read
NOT_OURS = ("lost+found",)  # what a volume has at its root; hidden files are not looked at either
SHA256 = re.compile(r"[0-9a-f]{64}")


def members(artifact: Path) -> list[Path]:
    """The files that SHA256SUMS covers, in name order."""
    files = [path for path in artifact.iterdir() if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in files if path.name not in UNSUMMED)


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """A certificate by itself: its checks, failed ones first."""

    ok: bool
    checks: list[Check]

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if not check.ok]

    @property
    def line(self) -> str:
        """What a run ends with."""
        return (
            "certificate: ok" if self.ok else f"certificate: FAILED ({len(self.failed)} of {len(self.checks)} checks)"
        )


def verdict(certificate: Mapping[str, Any]) -> Verdict:
    """A certificate is good when it says so and so does each of its checks; one without checks proves nothing.

    Raises KeyError for a key that it lacks, TypeError where it is of another form.
    """
    checks = [Check(check["name"], check["ok"] is True, check["detail"]) for check in certificate["checks"]]
    ok = certificate["ok"] is True and bool(checks) and all(check.ok for check in checks)
    return Verdict(ok, sorted(checks, key=lambda check: check.ok))


@dataclass(frozen=True)
class CertificateState:
    """A certificate beside the files that it should be of. `verdict`: ok, failed, stale (it is of other files), changed
    (of these, but one is missing, cut, other or too many) or missing; `fact` in a sentence.

    `checks`: how many verify made. `failed`: those that did not pass. `not_run`: those that it left out, each with why.
    `fix`: the command for what has changed.
    """

    verdict: str
    fact: str
    checks: int = 0
    failed: Sequence[str] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)
    fix: str = ""


def sums_sha256(artifact: Path) -> str | None:
    """The digest of SHA256SUMS, by which certificate and measurements name an artifact; None where there is none."""
    path = artifact / SUMS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def certificate_state(artifact: Path) -> CertificateState:
    """What the certificate says of the artifact as it is, by the names and sizes of its files and the content of all
    but the shards. One without checks, or of another form, has failed."""
    try:
        return _state(artifact)
    except OSError as error:
        return CertificateState("changed", f"{error.filename or artifact} cannot be read: {error.strerror}")


def _state(artifact: Path) -> CertificateState:
    path = artifact / CERTIFICATE
    if not path.is_file():
        return CertificateState("missing", f"{artifact} has no {CERTIFICATE}: verify has not seen it")
    certificate = read_json(path)
    listed = certificate.get("checks")
    checks = listed if isinstance(listed, list) and all(isinstance(row, dict) for row in listed) else []
    told = [{"name": str(row.get("name")), "ok": row.get("ok"), "detail": ""} for row in checks]
    found = verdict({"ok": certificate.get("ok"), "checks": told})
    if not found.ok:
        why = ", ".join(found.failed) or ("ok is not true" if checks else "unreadable")
        return CertificateState("failed", f"{path} says that it failed: {why}", len(checks), found.failed)
    if certificate.get("sums_sha256") != sums_sha256(artifact):
        return CertificateState("stale", f"{path} is of another artifact than the one beside it", len(checks))
    for change in changes(artifact):
        return CertificateState("changed", change.fact, len(checks), fix=change.hint)
    left_out = certificate.get("not_run")
    not_run = left_out if isinstance(left_out, dict) else {}
    return CertificateState("ok", f"{len(checks)} checks passed", len(checks), not_run=not_run)


@dataclass(frozen=True)
class Entry:
    """A file as it was certified: its sha256 in hex, and its bytes, which manifest.json does not say of itself."""

    sha256: str
    size: int | None


def entries(artifact: Path) -> dict[str, Entry]:
    """name -> what every file that SHA256SUMS covers has to be. Raises UserError where SHA256SUMS or manifest.json
    cannot be read, or the two do not say the same."""
    again = "make postprocess verify, or copy the artifact again from where it is whole"
    stated = stated_sums(artifact, again)
    path = artifact / MANIFEST
    listed = read(path, again).get("files")
    if not isinstance(listed, dict) or not listed:
        raise UserError(f"{path} names no files", again)
    found = {MANIFEST: Entry(stated.get(MANIFEST, ""), None)}
    for name, entry in listed.items():
        size = entry.get("bytes") if isinstance(entry, dict) else None
        if not is_name(name):
            raise UserError(f"{path} lists {name[:80]!r}, which is no name of a file in this folder", again)
        if type(size) is not int or size < 0:
            raise UserError(f"{path} does not say how many bytes {name} has", again)
        found[name] = Entry(str(entry.get("sha256")), size)
    for name in sorted(found.keys() | stated.keys()):
        if name not in found or found[name].sha256 != stated.get(name):
            raise UserError(f"{path} and {SUMS} do not say the same of {name}", again)
    return found


def is_name(name: str) -> bool:
    """Whether it names a file of a folder, and nothing elsewhere."""
    return name == Path(name).name and name not in ("", "..") and "\0" not in name


def changes(artifact: Path) -> Iterator[UserError]:
    """What of an artifact is not what was certified, each with what to do: a file that is missing, of another size or
    not listed, and, but for the shards, of other bytes. A link counts as what it leads to."""
    try:
        listed = entries(artifact)
    except UserError as error:
        yield error
        return
    for name, entry in sorted(listed.items()):
        path = artifact / name
        try:
            status = path.stat()
        except OSError as error:
            leads = f", a link to {os.readlink(path)}," if path.is_symlink() else ""
            yield UserError(f"{path}{leads} cannot be read: {error.strerror}", copy_again(artifact))
            continue
        if not stat.S_ISREG(status.st_mode):
            yield UserError(f"{path} is no file", copy_again(artifact))
        elif entry.size is not None and status.st_size != entry.size:
            fact = f"{path} has {status.st_size:,} bytes where {entry.size:,} were certified"
            yield UserError(fact, copy_again(artifact))
        elif path.suffix != SHARD and hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
            yield other_bytes(path)
    for path in sorted(artifact.iterdir()):
        if not (path.name in listed or path.name in (*UNSUMMED, *NOT_OURS) or path.name.startswith(".")):
            move = shlex.join(["mv", str(path), f"{artifact.absolute().parent}/"])
            yield UserError(f"{path} is none of the files that {MANIFEST} lists", move)


def other_bytes(path: Path) -> UserError:
    """What is said of a file whose content is not the certified one."""
    return UserError(f"{path} has other bytes than {SUMS} says", copy_again(path.parent))


def copy_again(artifact: Path) -> str:
    """What to do about files that are not the certified ones."""
    return f"{sums_command(artifact)} names all of them: copy or download those again"


def sums_command(artifact: Path) -> str:
    """What compares all bytes of an artifact with the certified ones."""
    return shlex.join(["python", "-m", "scripts.verify", "--artifact", os.fspath(artifact), "--sums-only"])


def check_certificate(artifact: Path, certificate: Mapping[str, Any]) -> None:
    """Raises UserError when a certificate, whatever it says, is about other files than the artifact's."""
    sums, digest = artifact / SUMS, sums_sha256(artifact)
    if digest is None:
        raise UserError(f"{sums} does not exist", "make postprocess")
    if certificate["sums_sha256"] != digest:
        raise UserError(f"{artifact / CERTIFICATE} is about other files than {sums}", "make verify")


def check(artifact: Path, again: str) -> CertificateState:
    """What the certificate of an artifact says that passed. Raises UserError for any other, with the hint `again`, or
    where files have changed with what to do about those."""
    found = certificate_state(artifact)
    if found.verdict != "ok":
        raise UserError(found.fact, found.fix or again)
    return found


def stated_sums(artifact: Path, again: str) -> dict[str, str]:
    """name -> sha256 in hex, as SHA256SUMS says. Raises UserError, with the hint `again`, when it cannot be read."""
    path = artifact / SUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        raise UserError(f"{path} is missing or damaged", again) from None
    stated = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        if not SHA256.fullmatch(digest) or not is_name(name):
            raise UserError(f"{path} has a line that is no checksum: {line[:80]!r}", again)
        stated[name] = digest
    return stated
