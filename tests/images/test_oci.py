"""Documents beside an image, on what loopback's docker-registry is not: a registry with the referrers API, one that
takes no artifacts, one whose listing cannot be trusted. tests/docker has the real registry.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator

import pytest
from registry_stand_in import Stored, serving

from v4forge.errors import UserError
from v4forge.images import oci
from v4forge.images.oci import MANIFESTS, Manifest, Refused, Repository, digest_of

IMAGE = Manifest("sha256:" + "a" * 64, MANIFESTS[1], b"{}")


@pytest.fixture
def server() -> Iterator[Stored]:
    with serving() as running:
        yield running


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
