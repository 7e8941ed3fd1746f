"""Documents beside an image, on what loopback's docker-registry is not: a registry with the referrers API, one that
takes no artifacts, one whose listing cannot be trusted. tests/images has the real registry.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from v4forge import oci
from v4forge.errors import UserError
from v4forge.oci import INDEX, MANIFESTS, Manifest, Refused, Repository, digest_of

IMAGE = Manifest("sha256:" + "a" * 64, MANIFESTS[1], b"{}")


class Stored(ThreadingHTTPServer):
    """A registry in memory: manifests by digest or tag, blobs by digest; `answers` are fixed answers by path."""

    referrers = True
    refuses = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def listed(self, subject: str) -> list[dict[str, Any]]:
        """What the referrers API gives: the manifests that name this subject."""
        found = []
        for name, (media_type, content) in self.manifests.items():
            value = json.loads(content)
            if name.startswith("sha256:") and value.get("subject", {}).get("digest") == subject:
                kind = value["artifactType"]
                found.append({"mediaType": media_type, "digest": name, "size": len(content), "artifactType": kind})
        return found


class Handler(BaseHTTPRequestHandler):
    server: Stored
    protocol_version = "HTTP/1.1"

    def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def chunked(self, content: bytes) -> None:
        """Sends a blob in two chunks, as registries behind a CDN do."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command == "GET":
            half = (len(content) + 1) // 2
            with suppress(OSError):  # the client stops at its limit
                for part in (content[:half], content[half:]):
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if part else b"")
                self.wfile.write(b"0\r\n\r\n")

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path in self.server.answers:
            code, headers = self.server.answers[path]
            return self.answer(code, **headers)
        what, _, name = path.removeprefix("/v2/x/").partition("/")
        if path == "/v2/":
            self.answer(200)
        elif what == "referrers" and self.server.referrers:
            index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": self.server.listed(name)}
            self.answer(200, json.dumps(index).encode(), Content_Type=INDEX)
        elif what == "manifests" and name in self.server.manifests:
            media_type, content = self.server.manifests[name]
            self.answer(200, content, Content_Type=media_type)
        elif what == "blobs" and name in self.server.blobs:
            self.chunked(self.server.blobs[name])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(202, Location="/v2/x/blobs/uploads/1")

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if match := re.search(r"digest=(sha256)(?:%3A|:)(\w+)", self.path):
            self.server.blobs[":".join(match.groups())] = content
            return self.answer(201)
        if self.server.refuses:
            return self.answer(400, b'{"errors": [{"code": "MANIFEST_INVALID", "message": "manifest invalid"}]}')
        self.server.manifests[self.path.rsplit("/", 1)[-1]] = (self.headers["Content-Type"], content)
        subject = json.loads(content).get("subject")
        self.answer(201, **({"OCI_Subject": subject["digest"]} if subject and self.server.referrers else {}))

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Stored]:
    with Stored() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("referrers", [True, False])
def test_documents_come_back_by_kind_with_the_referrers_api_and_without(server: Stored, referrers: bool) -> None:
    server.referrers = referrers
    remote = Repository(f"{server.host}/x")
    contents = {"sbom": [b"s"], "provenance": [b"p1", b"p2"], "signature": []}
    for kind, several in contents.items():
        for content in several:
            remote.attach(IMAGE, kind, content)
            remote.attach(IMAGE, kind, content)
    for kind, several in contents.items():
        assert list(remote.attached(IMAGE.digest, kind)) == several
    tag = IMAGE.digest.replace(":", "-")
    assert (tag in server.manifests) == (not referrers)


def test_a_registry_that_takes_no_artifacts_is_quoted(server: Stored) -> None:
    server.refuses = True
    with pytest.raises(Refused, match="400 MANIFEST_INVALID manifest invalid"):
        Repository(f"{server.host}/x").attach(IMAGE, "sbom", b"{}")


def change_blob(server: Stored) -> None:
    server.blobs[digest_of(b"document")] = b"another"


def change_manifest(server: Stored) -> None:
    name = next(iter(server.manifests))
    media_type, content = server.manifests[name]
    server.manifests[name] = (media_type, content + b" ")


def grow_blob(server: Stored) -> None:
    server.blobs[digest_of(b"document")] = bytes(oci.DOCUMENT_BYTES + 1)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (change_blob, "other bytes for the blob"),
        (change_manifest, "answers other bytes"),
        (grow_blob, "is too large for a document"),
    ],
)
def test_a_document_that_is_not_what_its_digest_says_is_refused(
    server: Stored, change: Callable[[Stored], None], fact: str
) -> None:
    remote = Repository(f"{server.host}/x")
    remote.attach(IMAGE, "sbom", b"document")
    change(server)
    with pytest.raises(UserError, match=fact):
        list(remote.attached(IMAGE.digest, "sbom"))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"layers": 1}', b'{"layers": [1]}', b'{"layers": [{}]}', b'{"layers": [{"digest": "../x"}]}'],
)
def test_what_others_attached_and_is_no_artifact_is_passed_over(server: Stored, content: bytes) -> None:
    remote = Repository(f"{server.host}/x")
    server.referrers = False
    remote.attach(IMAGE, "sbom", b"document")
    tag, kind = IMAGE.digest.replace(":", "-"), oci.DOCUMENTS["sbom"]
    server.manifests[digest_of(content)] = (MANIFESTS[0], content)
    media_type, index = server.manifests[tag]
    items = json.loads(index)["manifests"]
    items[:0] = [{"digest": digest_of(content), "artifactType": kind}, {"digest": "x", "artifactType": kind}]
    server.manifests[tag] = (media_type, json.dumps({"manifests": items}).encode())
    assert list(remote.attached(IMAGE.digest, "sbom")) == [b"document"]


@pytest.mark.parametrize("code", [401, 403])
def test_a_registry_that_wants_a_login_is_named(server: Stored, code: int) -> None:
    realm = f'Bearer realm="http://{server.host}/token",service="x"'
    server.answers["/v2/x/manifests/latest"] = (code, {"WWW_Authenticate": realm})
    server.answers["/token"] = (401, {})
    with pytest.raises(UserError, match=f"{server.host} does not let us in") as refused:
        Repository(f"{server.host}/x").manifest("latest")
    assert refused.value.hint == f"docker login {server.host}"


def test_a_failing_registry_is_quoted_at_once(server: Stored) -> None:
    server.answers["/v2/x/manifests/latest"] = (500, {})
    with pytest.raises(UserError, match=r"answers 500 for .*/x"):
        Repository(f"{server.host}/x").manifest("latest")


def test_a_registry_that_is_not_there_is_said_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(UserError, match=f"the registry {host} cannot be reached"):
            Repository(f"{host}/x")


@pytest.mark.parametrize("name", ["calib", "v4forge/calib", "r.example/", "r.example/Upper", "r.example/a:tag", ""])
def test_a_name_without_a_registry_or_with_a_tag_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"is not <registry>/<path>"):
        Repository(name)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1:5000", True),
        ("127.1.2.3", True),
        ("localhost:5000", True),
        ("localhost", True),
        ("r.example:5000", False),
        ("10.0.0.1:5000", False),
        ("127.0.0.1.example", False),
    ],
)
def test_only_loopback_is_spoken_to_in_plain_http(host: str, loopback: bool) -> None:
    assert oci.is_loopback(host) == loopback
