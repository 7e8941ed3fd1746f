"""A repository of an OCI registry: manifests and blobs by digest, and documents attached to an image.

A document is an artifact whose manifest names the image as its `subject`. Registries without the referrers API get the
index under the tag `sha256-<hex>` that the OCI distribution specification asks for in its place.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import docker.auth
import docker.errors
import oras.container
import oras.provider
import requests

from v4forge import http_clients, network
from v4forge.errors import UserError

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = {
    "mediaType": "application/vnd.oci.empty.v1+json",
    "digest": "sha256:" + hashlib.sha256(b"{}").hexdigest(),
    "size": 2,
}
DOCUMENTS = {
    "sbom": "application/vnd.cyclonedx+json",
    "provenance": "application/vnd.in-toto+json",
    "signature": "application/vnd.dsse.envelope.v1+json",
}
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
DOCUMENT_BYTES = 32 << 20
DOCUMENTS_READ = 32  # of one kind; anyone who may push can attach more
TIMEOUT_S = 60

logging.getLogger("oras").setLevel(logging.CRITICAL)


class Client(oras.provider.Registry):
    """oras's client, with two differences: no request is tried again for two minutes, and a token that was given for
    reading is not kept for writing."""

    def do_request(self, url: str, method: str = "GET", **options: Any) -> requests.Response:
        once = oras.provider.Registry.do_request.__wrapped__
        answer = once(self, url, method, **options)
        if answer.status_code == 401 and getattr(self.auth, "token", None):
            self.auth.token = None
            answer = once(self, url, method, **options)
        return answer


class Refused(Exception):
    """The registry took the request and said no."""


@dataclass(frozen=True)
class Manifest:
    """A manifest's own bytes; `value` is what they say."""

    digest: str
    media_type: str
    content: bytes

    @functools.cached_property
    def value(self) -> dict[str, Any]:
        return json.loads(self.content)

    def descriptor(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.content)}


class Repository:
    """`<host>/<path>` on a registry, with docker's own credentials for that host. Loopback registries speak HTTP."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host, slash, path = name.partition("/")
        if not slash or not re.search(r"[.:]|^localhost$", self.host) or not re.fullmatch(r"[a-z0-9._/-]+", path):
            raise UserError(f"{name!r} is not <registry>/<path>", "make push REGISTRY=<host>[:port]/<path>")
        self.container = oras.container.Container(name)
        self.prefix = f"/v2/{path}"
        self.client = self._client()

    def manifest(self, reference: str) -> Manifest | None:
        """The manifest of a digest or tag, None where there is none; its bytes have that digest, or UserError."""
        answer = self._request("GET", f"/manifests/{reference}", headers={"Accept": ", ".join((*MANIFESTS, INDEX))})
        if answer.status_code == 404:
            return None
        self._raise_for(answer)
        found = digest_of(answer.content)
        if reference.startswith("sha256:") and found != reference:
            raise UserError(
                f"{self.host} answers other bytes ({found}) for {self.name}@{reference}",
                "make images, or make push REGISTRY=<another one>",
            )
        return Manifest(found, answer.headers.get("Content-Type", ""), answer.content)

    def blob(self, digest: str) -> bytes:
        """A small blob."""
        answer = self._request("GET", f"/blobs/{digest}", stream=True)
        self._raise_for(answer)
        content = b""
        with self._reaching():
            for chunk in answer.iter_content(1 << 20):
                content += chunk
                if len(content) > DOCUMENT_BYTES:
                    raise UserError(f"{self.name}@{digest} is too large for a document", "remove it from the registry")
        if digest_of(content) != digest:
            raise UserError(
                f"{self.host} answers other bytes for the blob {digest} of {self.name}",
                "make images, or make push REGISTRY=<another one>",
            )
        return content

    def attach(self, image: Manifest, kind: str, content: bytes) -> None:
        """Stores a document of DOCUMENTS beside the image. The same document twice is stored once.

        Raises Refused when the registry takes no artifacts.
        """
        blob = {"mediaType": DOCUMENTS[kind], "digest": digest_of(content), "size": len(content)}
        for descriptor, data in ((EMPTY, b"{}"), (blob, content)):
            self._upload(descriptor, data)
        artifact = {
            "schemaVersion": 2,
            "mediaType": MANIFESTS[0],
            "artifactType": DOCUMENTS[kind],
            "config": EMPTY,
            "layers": [blob],
            "subject": image.descriptor(),
        }
        stored, answer = self._put(artifact, MANIFESTS[0])
        if "OCI-Subject" not in answer.headers:
            self._list(image, {**stored.descriptor(), "artifactType": DOCUMENTS[kind]})

    def attached(self, image_digest: str, kind: str) -> Iterator[bytes]:
        """The documents of this kind that are stored beside the image."""
        answer = self._request("GET", f"/referrers/{image_digest}")
        index = self.manifest(image_digest.replace(":", "-")) if answer.status_code != 200 else None
        content = answer.content if answer.status_code == 200 else index.content if index else b"{}"
        for item in digests(content, "manifests", DOCUMENTS[kind])[-DOCUMENTS_READ:]:
            artifact = self.manifest(item)
            for blob in digests(artifact.content, "layers") if artifact else ():
                yield self.blob(blob)

    def _list(self, image: Manifest, item: dict[str, Any]) -> None:
        """Adds an artifact to the index that stands in for the referrers API."""
        tag = image.digest.replace(":", "-")
        index = self.manifest(tag)
        others = index.value.get("manifests", []) if index else []
        items = [other for other in others if other["digest"] != item["digest"]] + [item]
        self._put({"schemaVersion": 2, "mediaType": INDEX, "manifests": items}, INDEX, tag)

    def _put(self, value: dict[str, Any], media_type: str, tag: str = "") -> tuple[Manifest, requests.Response]:
        content = json.dumps(value, separators=(",", ":"), sort_keys=True).encode("utf-8")
        manifest = Manifest(digest_of(content), media_type, content)
        path = f"/manifests/{tag or manifest.digest}"
        answer = self._request("PUT", path, data=content, headers={"Content-Type": media_type})
        if not answer.ok:
            raise Refused(f"{answer.status_code} {said(answer)}")
        return manifest, answer

    def _upload(self, descriptor: dict[str, Any], content: bytes) -> None:
        with tempfile.NamedTemporaryFile() as file, self._reaching():
            file.write(content)
            file.flush()
            answer = self.client.upload_blob(file.name, self.container, descriptor)
        if not answer.ok:
            raise Refused(f"{answer.status_code} {said(answer)}")

    def _client(self) -> Client:
        scheme = "http" if is_loopback(self.host) else "https"
        with self._reaching():
            challenge = http_clients.session().get(f"{scheme}://{self._address()}/v2/", timeout=TIMEOUT_S)
        basic = challenge.headers.get("WWW-Authenticate", "").lower().startswith("basic")
        client = Client(insecure=scheme == "http", auth_backend="basic" if basic else "token")
        http_clients.equip(client.session)
        client.session.request = functools.partial(client.session.request, timeout=TIMEOUT_S)
        self.container.registry = self._address()
        known = None
        with suppress(docker.errors.DockerException):
            known = docker.auth.load_config().resolve_authconfig(self.host)
        if known and known.get("password"):
            client.auth.set_basic_auth(known["username"], known["password"])
        elif basic:
            raise self._unauthorized()
        return client

    def _address(self) -> str:
        return "registry-1.docker.io" if self.host == "docker.io" else self.host

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        with self._reaching():
            return self.client.do_request(
                f"{self.client.prefix}://{self._address()}{self.prefix}{path}", method, **options
            )

    def _raise_for(self, answer: requests.Response) -> None:
        if answer.status_code in (401, 403):
            raise self._unauthorized()
        if not answer.ok:
            raise UserError(f"{self.host} answers {answer.status_code} for {self.name}: {said(answer)}", "make push")

    def _unauthorized(self) -> UserError:
        return UserError(f"{self.host} does not let us in to {self.name}", f"docker login {self.host}")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except requests.RequestException as error:
            if network.is_distrust(error):
                raise network.distrusted(self.host, error) from None
            raise unreachable(self.host, type(error).__name__) from None
        except ValueError:  # what oras raises when it cannot answer a challenge
            raise self._unauthorized() from None


def digests(document: bytes, key: str, artifact_type: str | None = None) -> list[str]:
    """The digests in a list of an index or manifest; anyone who may push can store one that is malformed."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        listed = [item for item in json.loads(document)[key] if item.get("artifactType") == artifact_type]
        return [item["digest"] for item in listed if DIGEST.fullmatch(item["digest"])]
    return []


def unreachable(host: str, why: str) -> UserError:
    return UserError(f"the registry {host} cannot be reached ({why})", f"check that it runs: curl {host}/v2/")


def is_loopback(host: str) -> bool:
    name = host.rsplit(":", 1)[0].strip("[]")
    with suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def said(answer: requests.Response) -> str:
    """The registry's own reason, in a few words."""
    with suppress(ValueError, KeyError, IndexError, TypeError, AttributeError):
        error = answer.json()["errors"][0]
        return re.sub(r"[^ -~]", "?", f"{error['code']} {error.get('message', '')}".strip())[:200]
    return answer.reason or ""
