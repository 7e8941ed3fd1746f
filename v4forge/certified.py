"""Whether a folder is the artifact that was certified: one answer, for serving, benches, publishing and Kubernetes.

By names and sizes it is free (`artifact_folder`), by contents the shards are read, once (`contents`). A signature says
whose certificate it is.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from v4forge import artifact_folder, contents, signatures
from v4forge.artifact_folder import CERTIFICATE, SIGNATURE, SUMS, CertificateState
from v4forge.contents import Memory, Steps, identity, silent
from v4forge.digests import Digests, file_sha256
from v4forge.errors import UserError
from v4forge.files import write_text

SIZES, CONTENTS = LEVELS = ("sizes", "contents")
STATEMENT, CERTIFIED = "https://in-toto.io/Statement/v1", "urn:v4forge:certificate:v1"


def check(
    artifact: Path,
    again: str,
    level: str = CONTENTS,
    key: Path | None = None,
    steps: Steps = silent,
    memory: Path | None = None,
) -> CertificateState:
    """What the certificate says of an artifact that is what was certified.

    level: one of LEVELS. key: the file of a public key that has to have signed the certificate. memory: where digests
    are remembered, if not beside the artifact. Raises UserError for any other folder, with the hint `again` where it
    has no passing certificate.
    """
    found = artifact_folder.check(artifact, again)
    if key:
        check_signature(artifact, key)
    if level == CONTENTS:
        listed = artifact_folder.entries(artifact)
        for name in _differing(listed, contents.of(list(listed), Memory(artifact, memory), steps)):
            raise artifact_folder.other_bytes(artifact / name)
    return found


def _differing(listed: Mapping[str, artifact_folder.Entry], found: Mapping[str, str]) -> list[str]:
    """The files among `found`, name -> sha256, that are not the certified ones."""
    return sorted(name for name, sha256 in found.items() if listed[name].sha256 != sha256)


def all_changes(artifact: Path, steps: Steps = silent) -> list[UserError]:
    """Everything that is not what was certified. Every byte is read now, whatever is remembered."""
    changes = {change.fact: change for change in artifact_folder.changes(artifact)}
    listed: Mapping[str, artifact_folder.Entry] = {}
    with suppress(UserError):  # which is among the changes
        listed = artifact_folder.entries(artifact)
    there = [name for name, entry in listed.items() if _has_size(artifact / name, entry.size)]
    for name in _differing(listed, contents.of(there, Memory(artifact), steps, anew=True)):
        change = artifact_folder.other_bytes(artifact / name)
        changes[change.fact] = change
    return list(changes.values())


def _has_size(path: Path, size: int | None) -> bool:
    return path.is_file() and (size is None or path.stat().st_size == size)


def remember(artifact: Path, known: Digests) -> None:
    """Remembers the files whose digest `known` has just found, so that nobody reads them again."""
    with suppress(UserError, OSError):
        paths = {name: artifact / name for name in artifact_folder.entries(artifact)}
        found = {name: (identity(path), known.known(path)) for name, path in paths.items()}
        Memory(artifact).learn({name: (what, sha256) for name, (what, sha256) in found.items() if sha256})


def sign(artifact: Path, key: Path) -> Path:
    """Signs the certificate of an artifact, by the private key of a file -> the file of the signature, beside it.

    Raises UserError where the certificate does not pass for these files, by name and size, or nothing can be written.
    """
    artifact_folder.check(artifact, "make verify")
    sums, certificate = artifact_folder.sums_sha256(artifact), file_sha256(artifact / CERTIFICATE)
    subjects = [{"name": CERTIFICATE, "digest": {"sha256": certificate}}, {"name": SUMS, "digest": {"sha256": sums}}]
    statement = {"_type": STATEMENT, "subject": subjects, "predicateType": CERTIFIED, "predicate": {}}
    content = (json.dumps(statement, indent=1, sort_keys=True) + "\n").encode()
    write_text(artifact / SIGNATURE, signatures.sign(content, key).decode())
    return artifact / SIGNATURE


def check_signature(artifact: Path, key: Path) -> None:
    """Raises UserError unless the certificate beside an artifact's files is signed by the public key of a file."""
    path = artifact / SIGNATURE
    again = f"{shlex.join(['python', '-m', 'scripts.certified', 'sign', str(artifact)])} --key <its private key>"
    again += ", or another VERIFY_KEY"
    envelope = path.read_bytes() if path.is_file() else None
    statement = signatures.verified(envelope or b"", key)
    if envelope is None:
        raise UserError(f"{artifact / CERTIFICATE} is not signed: there is no {SIGNATURE}", again)
    if statement is None:
        raise UserError(f"{artifact / CERTIFICATE} is not signed by the key {key}", again)
    with suppress(KeyError, TypeError, ValueError, RecursionError):
        told = json.loads(statement)
        digests = {each["name"]: each["digest"]["sha256"] for each in told["subject"]}
        if told["predicateType"] == CERTIFIED and digests[CERTIFICATE] == file_sha256(artifact / CERTIFICATE):
            return
    raise UserError(f"{path} is of another certificate than {CERTIFICATE}", again)
