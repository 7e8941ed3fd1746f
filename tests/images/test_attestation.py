"""Provenance says what an image was made of and nothing of who made it; a signature is the right key's or none."""

from __future__ import annotations

import base64
import getpass
import hashlib
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

from v4forge.errors import UserError
from v4forge.images import attestation

IMAGE = "sha256:" + "a" * 64
KINDS = {
    "ed25519": ("-algorithm", "ed25519"),
    "ecdsa": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
    "rsa": ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
}


def statement(commands: Sequence[Sequence[str]] = (), **parameters: str) -> dict[str, Any]:
    dependencies = [
        attestation.revision("v4forge", "c" * 40),
        attestation.image("debian:bookworm", "sha256:" + "b" * 64),
    ]
    return attestation.provenance("v4forge-calib", IMAGE, parameters, dependencies, commands, {"docker": "1"}, b"sbom")


def keypair(folder: Path, kind: str = "ed25519") -> tuple[Path, Path]:
    private, public = folder / f"{kind}.pem", folder / f"{kind}.pub"
    options = {"check": True, "capture_output": True}
    subprocess.run(["openssl", "genpkey", *KINDS[kind], "-out", private], **options)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], **options)
    return private, public


def test_a_statement_has_the_form_of_slsa_provenance() -> None:
    value = statement(LANE="cpu")
    assert value["_type"] == "https://in-toto.io/Statement/v1"
    assert value["predicateType"] == "https://slsa.dev/provenance/v1"
    assert value["subject"] == [{"name": "v4forge-calib", "digest": {"sha256": "a" * 64}}]
    definition, run = value["predicate"]["buildDefinition"], value["predicate"]["runDetails"]
    assert definition["externalParameters"] == {"LANE": "cpu"}
    assert [item["name"] for item in definition["resolvedDependencies"]] == ["debian:bookworm", "v4forge"]
    assert run["builder"] == {"id": "urn:v4forge:make-images", "version": {"docker": "1"}}
    assert attestation.byproducts(attestation.encoded(value)) == {"sbom": hashlib.sha256(b"sbom").hexdigest()}


def test_a_file_is_named_by_its_digest(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_bytes(b"torch")
    named = attestation.file(tmp_path / "lock.txt", "docker/lock.txt")
    assert named == {"name": "docker/lock.txt", "digest": {"sha256": hashlib.sha256(b"torch").hexdigest()}}


def test_the_same_inputs_give_the_same_bytes_in_any_order() -> None:
    one = attestation.encoded(statement(A="1", B="2"))
    assert one == attestation.encoded(statement(B="2", A="1"))
    for name in (platform.node(), getpass.getuser(), str(Path.home())):
        assert name.encode() not in one


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("--secret=id=ca,src=/etc/ssl/corp.pem", "--secret=id=ca"),
        ("id=pip,src=/home/me/pip.conf", "id=pip"),
        ("id=token,env=MY_TOKEN,type=env", "id=token,type=env"),
        ("APT_SNAPSHOT=https://me:pw@mirror.example/debian", "APT_SNAPSHOT=https://mirror.example/debian"),
        ("/home/me/v4forge/Dockerfile.calib", "Dockerfile.calib"),
        ("--iidfile=/tmp/me/iid", "--iidfile=iid"),
        ("SOURCE_DATE_EPOCH=1", "SOURCE_DATE_EPOCH=1"),
        ("--tag=v4forge-calib:local", "--tag=v4forge-calib:local"),
    ],
)
def test_what_belongs_to_a_machine_or_user_is_left_out_of_commands(argument: str, shown: str) -> None:
    value = statement([["docker", "build", argument]], ARGUMENT=argument)
    definition = value["predicate"]["buildDefinition"]
    assert definition["internalParameters"]["commands"] == [["docker", "build", shown]]
    assert definition["externalParameters"] == {"ARGUMENT": shown}


def test_the_manifests_digest_becomes_one_more_subject_and_only_once() -> None:
    manifest = "sha256:" + "d" * 64
    once = attestation.with_subject(attestation.encoded(statement()), "r.example/calib", manifest)
    assert attestation.subjects(once) == {IMAGE, manifest}
    assert attestation.with_subject(once, "r.example/calib", manifest) == once


@given(st.binary() | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps).map(str.encode))
def test_anything_else_is_no_statement(content: bytes) -> None:
    with pytest.raises(UserError, match="not an in-toto statement"):
        attestation.subjects(content)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_key_signed_its_public_key_verifies(tmp_path: Path, kind: str) -> None:
    private, public = keypair(tmp_path, kind)
    content = attestation.encoded(statement())
    assert attestation.verified(attestation.sign(content, private), public) == content


def test_an_envelope_is_dsse_and_openssl_verifies_it(tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    content = attestation.encoded(statement())
    envelope = json.loads(attestation.sign(content, private))
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(content), content)
    (tmp_path / "signed").write_bytes(signed)
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    command = ["openssl", "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public]
    subprocess.run(
        [*command, "-in", tmp_path / "signed", "-sigfile", tmp_path / "sig"], check=True, capture_output=True
    )


def test_another_key_another_payload_or_another_type_is_not_verified(tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    _, other = keypair(tmp_path, "ecdsa")
    envelope = attestation.sign(attestation.encoded(statement()), private)
    assert attestation.verified(envelope, other) is None
    payload = base64.b64encode(attestation.encoded(statement(LANE="cuda"))).decode()
    for key, value in (("payload", payload), ("payloadType", "text/plain"), ("signatures", [])):
        assert attestation.verified(json.dumps({**json.loads(envelope), key: value}).encode(), public) is None


def test_what_the_key_signed_as_something_else_is_no_signature_of_a_statement(tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    envelope = Envelope(attestation.encoded(statement()), "text/plain", {})
    envelope.sign(CryptoSigner(load_pem_private_key(private.read_bytes(), None)))
    assert attestation.verified(json.dumps(envelope.to_dict()).encode(), public) is None


def test_a_signature_under_the_right_keys_name_is_not_enough(tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    foreign, _ = keypair(tmp_path, "ecdsa")
    content = attestation.encoded(statement())
    ours, theirs = (json.loads(attestation.sign(content, key)) for key in (private, foreign))
    theirs["signatures"][0]["keyid"] = ours["signatures"][0]["keyid"]
    assert attestation.verified(json.dumps(theirs).encode(), public) is None


@pytest.mark.parametrize(
    "envelope",
    [b"", b"[]", b"{}", b"null", b'{"payload": 1, "payloadType": 2, "signatures": 3}', b"[" * 100_000, b"\xff"],
)
def test_what_is_no_envelope_is_not_verified(tmp_path: Path, envelope: bytes) -> None:
    _, public = keypair(tmp_path)
    assert attestation.verified(envelope, public) is None


def test_a_key_that_cannot_be_used_is_named_with_what_to_do(tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "pkey", "-in", private, "-aes256", "-passout", "pass:x", "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)
    x25519 = tmp_path / "x25519.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "x25519", "-out", x25519], check=True, capture_output=True)
    text = tmp_path / "text"
    text.write_text("no key", encoding="utf-8")
    for key, fact in (
        (encrypted, "is encrypted"),
        (text, "is not an Ed25519"),
        (x25519, "is not an Ed25519"),
        (public, "is not an Ed25519"),
        (tmp_path / "none", "cannot read SIGN_KEY"),
        (tmp_path, "cannot read SIGN_KEY"),
    ):
        with pytest.raises(UserError, match=fact):
            attestation.sign(b"", key)
    for key, fact in ((text, "is not an Ed25519"), (private, "is not an Ed25519"), (tmp_path / "none", "cannot read")):
        with pytest.raises(UserError, match=fact):
            attestation.verified(b"", key)
