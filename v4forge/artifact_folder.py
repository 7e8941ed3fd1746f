"""The artifact folder: what its files are called, which of them SHA256SUMS covers, what its certificate says of them.

Serving, publishing, releasing and the reports ask it. Standard library only: it is read where there is no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4forge.errors import UserError
from v4forge.files import read_json

FORMAT = 2  # of the manifest
MANIFEST, SUMS, CARD, RUN, CERTIFICATE = "manifest.json", "SHA256SUMS", "README.md", "run.json", "certificate.json"
UNSUMMED = (SUMS, CERTIFICATE, CARD, RUN)  # written after the sums, or holding them


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
    """A certificate beside the files that it should be of. `verdict`: ok, failed, stale (it is of other files) or
    missing; `fact` in a sentence.


    `checks`: how many verify made. `failed`: those that did not pass. `not_run`: those that it left out, each with why.
    """

    verdict: str
    fact: str
    checks: int = 0
    failed: Sequence[str] = ()
    not_run: Mapping[str, str] = field(default_factory=dict)


def sums_sha256(artifact: Path) -> str | None:
    """The digest of SHA256SUMS, by which certificate and measurements name an artifact; None where there is none."""
    path = artifact / SUMS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def certificate_state(artifact: Path) -> CertificateState:
    """What the certificate says of the artifact as it is. One without checks, or of another form, has failed."""
    path = artifact / CERTIFICATE
    if not path.is_file():
        return CertificateState("missing", f"{artifact} has no {CERTIFICATE}: verify has not seen it")
    certificate = read_json(path)
    listed = certificate.get("checks")
    checks = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    told = [{"name": str(row.get("name")), "ok": row.get("ok"), "detail": ""} for row in checks]
    found = verdict({"ok": certificate.get("ok"), "checks": told})
    if not found.ok:
        why = ", ".join(found.failed) or ("ok is not true" if checks else "unreadable")
        return CertificateState("failed", f"{path} says that it failed: {why}", len(checks), found.failed)
    if certificate.get("sums_sha256") != sums_sha256(artifact):
        return CertificateState("stale", f"{path} is of another artifact than the one beside it", len(checks))
    left_out = certificate.get("not_run")
    not_run = left_out if isinstance(left_out, dict) else {}
    return CertificateState("ok", f"{len(checks)} checks passed", len(checks), not_run=not_run)


def check_certificate(artifact: Path, certificate: Mapping[str, Any]) -> None:
    """Raises UserError when a certificate, whatever it says, is about other files than the artifact's."""
    sums, digest = artifact / SUMS, sums_sha256(artifact)
    if digest is None:
        raise UserError(f"{sums} does not exist", "make postprocess")
    if certificate["sums_sha256"] != digest:
        raise UserError(f"{artifact / CERTIFICATE} is about other files than {sums}", "make verify")


def check(artifact: Path, again: str) -> CertificateState:
    """What the certificate of an artifact says that passed. Raises UserError, with the hint `again`, for any other."""
    found = certificate_state(artifact)
    if found.verdict != "ok":
        raise UserError(found.fact, again)
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
        if len(digest) != 64 or not name or name != Path(name).name:
            raise UserError(f"{path} has a line that is no checksum: {line[:80]!r}", again)
        stated[name] = digest
    return stated
