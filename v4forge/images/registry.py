"""Images to and from a registry, by digest only; images.lock says which.

push writes images.lock once the registry has given back what was pushed. pull checks everything that the lock says
before a layer is downloaded, and what the daemon has afterwards.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker import DockerClient
from docker.errors import APIError, ImageNotFound

from v4forge import pins, signatures
from v4forge.errors import UserError
from v4forge.files import write_text
from v4forge.images import attestation, definitions, refusals
from v4forge.images.archive import patient, shortened
from v4forge.images.oci import Manifest, Refused, Repository
from v4forge.units import MB, counted

Say = Callable[[str], None]

SAID_EVERY_S = 5.0
LOCK_HEADER = "# Written by `make push`: the images that `make pull` and CI use. Empty: never pushed.\n"
REFERENCE = re.compile(r"(?P<repository>[^@\s]+)@(?P<digest>sha256:[0-9a-f]{64})")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Locked:
    """What images.lock says of one image; all empty when it was never pushed."""

    reference: str = ""
    image_id: str = ""
    provenance_sha256: str = ""


# --- images.lock


def locked(name: str, lock: Path = definitions.LOCK) -> Locked:
    """What the lock says of an image. Raises UserError when a value has not the form that push writes."""
    text = lock.read_text(encoding="utf-8") if lock.exists() else ""
    values = pins.parse(text, lock.name)
    entry = Locked(*(values.get(key, "") for key in keys(name)))
    if entry == Locked():
        return entry
    forms = (REFERENCE, DIGEST, re.compile(r"[0-9a-f]{64}|"))
    for key, form in zip(keys(name), forms, strict=True):
        if not form.fullmatch(values.get(key, "")):
            raise UserError(
                f"{lock.name}: {key}={values.get(key, '')} is not what `make push` writes", f"git checkout {lock.name}"
            )
    return entry


def write_lock(name: str, entry: Locked, lock: Path = definitions.LOCK) -> None:
    """Replaces the lines of one image; those of the others stay."""
    entries = {other: locked(other, lock) for other in definitions.IMAGES} | {name: entry}
    lines = [
        f"{key}={value}"
        for other, known in entries.items()
        for key, value in zip(keys(other), (known.reference, known.image_id, known.provenance_sha256), strict=True)
    ]
    write_text(lock, LOCK_HEADER + "\n".join(lines) + "\n")


def keys(name: str) -> tuple[str, str, str]:
    return f"{name.upper()}_IMAGE", f"{name.upper()}_IMAGE_ID", f"{name.upper()}_PROVENANCE_SHA256"


# --- push


def push(
    client: DockerClient,
    name: str,
    image: str,
    repository: str,
    documents: Mapping[str, bytes],
    say: Say,
    sign_key: Path | None = None,
    lock: Path = definitions.LOCK,
) -> Locked:
    """Pushes `image`, with its documents ("sbom", "provenance"), and writes the lock; what the lock says now.

    The provenance is stored with the manifest's digest as one more subject, and signed by the private key in
    `sign_key`.
    """
    remote = Repository(repository)
    image_id = local(client, image).id
    if image_id not in attestation.subjects(documents["provenance"]):
        raise UserError(f"the provenance is not that of {image}, {image_id}", f"make images IMAGE={name}")
    digest = send(client, image_id, repository, say)
    manifest = present(remote, digest)
    if image_id not in (config_digest(manifest), digest):
        raise UserError(f"{remote.host} gave back another image than {image_id}", "make push once more")
    provenance = documents["provenance"]
    for known_as in (config_digest(manifest), digest):
        provenance = attestation.with_subject(provenance, repository, known_as)
    documents = {**documents, "provenance": provenance}
    if sign_key:
        documents["signature"] = signatures.sign(provenance, sign_key)
    try:
        for kind, content in documents.items():
            remote.attach(manifest, kind, content)
            say(f"push: {kind}, {len(content):,} bytes, attached")
        provenance_sha256 = hashlib.sha256(provenance).hexdigest()
    except Refused as error:
        if sign_key:
            raise UserError(
                f"{remote.host} takes no signature: {error}", "make push to a registry that takes OCI artifacts"
            ) from None
        say(f"push: {remote.host} takes no attached documents ({error}); they stay files here")
        provenance_sha256 = ""
    entry = Locked(f"{repository}@{digest}", config_digest(manifest), provenance_sha256)
    write_lock(name, entry, lock)
    return entry


def send(client: DockerClient, image_id: str, repository: str, say: Say) -> str:
    """Uploads the image; the digest that the registry answered. The tag that docker needs for it is removed again."""
    tag = image_id.removeprefix("sha256:")[:12]
    image = client.images.get(image_id)
    only = not image.tags  # the image would go with its only tag
    image.tag(repository, tag)
    patient(client)
    try:
        events = client.api.push(repository, tag=tag, stream=True, decode=True)
        digest = transfer(events, "push", f"{repository}:{tag}", say)
    except APIError as error:
        raise reason(str(error.explanation or error), f"{repository}:{tag}") from None
    finally:
        if not only:
            with suppress(APIError):
                client.api.remove_image(f"{repository}:{tag}", noprune=True)
    if not DIGEST.fullmatch(digest):
        raise UserError(f"docker named no digest for {repository}", "make push once more")
    return digest


# --- pull


def pull(
    client: DockerClient,
    name: str,
    tag: str,
    say: Say,
    verify_key: Path | None = None,
    lock: Path = definitions.LOCK,
) -> dict[str, bytes]:
    """Pulls the image that the lock names and calls it `tag`; its documents.

    Raises UserError for any other image, and for one that the public key in `verify_key` did not sign.
    """
    entry = locked(name, lock)
    if not entry.reference:
        raise UserError(
            f"the image {name} was never pushed: {lock.name} has no digest for it",
            f"make images IMAGE={name}, or make push IMAGE={name} REGISTRY=<registry>",
        )
    repository, digest = entry.reference.split("@")
    remote = Repository(repository)
    documents = check(name, entry, remote, present(remote, digest), verify_key)
    patient(client)
    try:
        transfer(client.api.pull(repository, tag=digest, stream=True, decode=True), "pull", entry.reference, say)
        image = client.images.get(entry.reference)
    except APIError as error:
        raise reason(str(error.explanation or error), entry.reference) from None
    if image.id not in (entry.image_id, digest):  # containerd's image store names an image by its manifest
        raise UserError(f"docker pulled {image.id}, {lock.name} says {entry.image_id}", f"git log {lock.name}")
    image.tag(*tag.rsplit(":", 1))
    return documents


def check(
    name: str, entry: Locked, remote: Repository, manifest: Manifest, verify_key: Path | None = None
) -> dict[str, bytes]:
    """Compares image ID, labels, provenance and signature with the lock and this checkout; the documents."""
    found = config_digest(manifest)
    if found != entry.image_id:
        raise UserError(
            f"{entry.reference} is the image {found}; images.lock says {entry.image_id}",
            "git log images.lock; make push writes both together",
        )
    labels = labels_of(remote, found)
    for label, wanted in definitions.expected_labels(name).items():
        if labels.get(label) != wanted:
            revision = str(labels.get("org.opencontainers.image.revision"))
            known = re.fullmatch(r"[0-9a-f]{40}", revision)
            other = shortened(repr(labels.get(label, "")))
            raise UserError(
                f"{entry.reference} has the label {label}={other}; this checkout asks for {wanted}",
                f"make images IMAGE={name}" + (f", or git checkout {revision}" if known else ""),
            )
    provenance = document(remote, manifest, "provenance", entry.provenance_sha256)
    if entry.provenance_sha256 and not provenance:
        raise UserError(
            f"{entry.reference} has no provenance with the sha256 {entry.provenance_sha256} of images.lock",
            f"make push IMAGE={name} REGISTRY=<registry>",
        )
    if verify_key:
        check_signature(provenance, remote, manifest.digest, verify_key)
    if not provenance:
        return {}
    if not {found, manifest.digest} <= attestation.subjects(provenance):
        raise UserError(f"the provenance of {entry.reference} is on another image", f"make push IMAGE={name}")
    sbom = document(remote, manifest, "sbom", attestation.byproducts(provenance).get("sbom", ""))
    return {"provenance": provenance} | ({"sbom": sbom} if sbom else {})


def check_signature(statement: bytes, remote: Repository, digest: str, key: Path) -> None:
    """Raises UserError unless the statement on the manifest `digest` is signed by the public key of a file."""
    signed = [signatures.verified(document, key) for document in remote.attached(digest, "signature")]
    if statement not in signed:
        fact = f"signed, but not by the key {key}" if signed else "not signed"
        raise UserError(f"the image is {fact}", "make push SIGN_KEY=<its private key>, or another VERIFY_KEY")


def labels_of(remote: Repository, image_id: str) -> dict[str, str]:
    """What an image says of itself."""
    return json.loads(remote.blob(image_id)).get("config", {}).get("Labels") or {}


def document(remote: Repository, manifest: Manifest, kind: str, sha256: str) -> bytes:
    """The attached document of this kind and digest; b"" when there is none."""
    attached = remote.attached(manifest.digest, kind) if sha256 else ()
    return next((content for content in attached if hashlib.sha256(content).hexdigest() == sha256), b"")


# --- what both need


def local(client: DockerClient, image: str) -> Any:
    try:
        return client.images.get(image)
    except ImageNotFound:
        raise refusals.no_built_image(image) from None


def present(remote: Repository, digest: str) -> Manifest:
    manifest = remote.manifest(digest)
    if manifest is None:
        raise UserError(f"{remote.host} has no {remote.name}@{digest}", "make images, or make push REGISTRY=<registry>")
    return manifest


def config_digest(manifest: Manifest) -> str:
    try:
        return manifest.value["config"]["digest"]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{manifest.digest} is not the manifest of one image", "make push writes one") from None


def transfer(events: Iterable[dict[str, Any]], what: str, reference: str, say: Say) -> str:
    """Follows docker's stream, a line of progress every few seconds; the digest it ends with, "" for a pull."""
    layers: dict[str, tuple[int, int]] = {}
    finished: set[str] = set()
    digest = ""
    started = said = time.monotonic()
    for event in events:
        if "error" in event:
            raise reason(str(event["error"]), reference)
        digest = event.get("aux", {}).get("Digest", digest)
        layer, status = event.get("id", ""), event.get("status", "")
        if not re.fullmatch(r"[0-9a-f]{12}", layer):
            continue
        amounts = event.get("progressDetail") or {}
        layers.setdefault(layer, (0, 0))
        if status in ("Pushing", "Downloading") and amounts.get("total"):
            layers[layer] = (amounts.get("current", 0), amounts["total"])
        if status in ("Pushed", "Pull complete", "Layer already exists", "Already exists") or "Mounted" in status:
            finished.add(layer)
        if time.monotonic() - said >= SAID_EVERY_S:
            said = time.monotonic()
            done, total = (sum(column) / MB for column in zip(*layers.values(), strict=True))
            say(f"{what}: {len(finished)} of {counted(len(layers), 'layers')}, {done:,.0f} of {total:,.0f} MB")
    say(f"{what}: {counted(len(layers), 'layers')} in {time.monotonic() - started:.0f} s")
    return digest


def reason(message: str, reference: str) -> UserError:
    """What a daemon's error means for the user."""
    otherwise = UserError(f"docker says of {reference}: {message}", "docker info")
    host = reference.partition("/")[0]
    return refusals.explained(message, refusals.OF_A_TRANSFER, otherwise, host=host, reference=reference)
