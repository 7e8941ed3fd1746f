"""How an image was made, as an in-toto statement with SLSA provenance. v4forge/signatures.py signs it.

A statement has the same bytes for the same inputs: no time, host or user stands in it.
https://slsa.dev/spec/v1.0/provenance, https://github.com/in-toto/attestation
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from v4forge.errors import UserError

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:v4forge:image-build:v1"
BUILDER = "urn:v4forge:make-images"

Dependency = dict[str, Any]


def provenance(
    name: str,
    image_id: str,
    parameters: Mapping[str, str],
    dependencies: Iterable[Dependency],
    commands: Sequence[Sequence[str]],
    builder: Mapping[str, str],
    sbom: bytes,
) -> dict[str, Any]:
    """The statement on the image `image_id` (sha256:…, the digest of its config).

    `parameters` are the build arguments, `dependencies` come from `file`, `image` and `revision`, `commands` are what
    was run, `builder` the versions of what ran it, `sbom` the image's bill of materials. Credentials in addresses, the
    sources of build secrets and the folders of absolute paths are left out.
    """
    return {
        "_type": STATEMENT,
        "subject": [subject(name, image_id)],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {key: public(value) for key, value in sorted(parameters.items())},
                "internalParameters": {"commands": [[public(part) for part in command] for command in commands]},
                "resolvedDependencies": sorted(dependencies, key=lambda item: item["name"]),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": dict(builder)},
                "byproducts": [{"name": "sbom", "digest": {"sha256": hashlib.sha256(sbom).hexdigest()}}],
            },
        },
    }


def file(path: Path, name: str) -> Dependency:
    """A file that went into the image."""
    with open(path, "rb") as content:
        return {"name": name, "digest": {"sha256": hashlib.file_digest(content, "sha256").hexdigest()}}


def image(reference: str, digest: str) -> Dependency:
    """The base image, by the digest of its manifest or, for one that only the daemon has, its ID."""
    return {"name": reference, "digest": {"sha256": digest.removeprefix("sha256:")}}


def revision(name: str, commit: str) -> Dependency:
    """The commit of a source tree."""
    return {"name": name, "digest": {"gitCommit": commit}}


def subject(name: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest.removeprefix("sha256:")}}


def public(argument: str) -> str:
    """An argument of a build without what belongs to this machine or to its user."""
    argument = re.sub(r"(://)[^/@\s]+@", r"\1", argument)
    if re.match(r"(--secret=)?id=", argument):
        return re.sub(r",(src|source|env)=[^,]*", "", argument)
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{posixpath.basename(value)}" if value.startswith("/") else argument


def encoded(statement: Mapping[str, Any]) -> bytes:
    """The bytes of a statement that are stored, signed and named by digest."""
    return (json.dumps(statement, indent=1, sort_keys=True) + "\n").encode("utf-8")


def with_subject(statement: bytes, name: str, digest: str) -> bytes:
    """The statement, made on one more digest: that of the manifest under which a registry has the image."""
    if digest in subjects(statement):
        return statement
    value = parsed(statement)
    return encoded({**value, "subject": [*value["subject"], subject(name, digest)]})


def subjects(statement: bytes) -> set[str]:
    """The digests, sha256:…, on which the statement is made."""
    return {f"sha256:{item['digest']['sha256']}" for item in parsed(statement)["subject"]}


def byproducts(statement: bytes) -> dict[str, str]:
    """sha256 by name of the documents that came with the image, "sbom" among them."""
    listed = parsed(statement)["predicate"]["runDetails"].get("byproducts", [])
    return {item["name"]: item["digest"]["sha256"] for item in listed}


def parsed(statement: bytes) -> dict[str, Any]:
    try:
        value = json.loads(statement)
        if value["_type"] == STATEMENT and all(item["digest"]["sha256"] for item in value["subject"]):
            return value
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise UserError("this is not an in-toto statement with sha256 subjects", "make images writes it anew")
