"""v4forge.signatures: what a key signed, and what it did not."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from keys import KINDS, keypair
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner

from v4forge import signatures
from v4forge.errors import UserError

STATEMENT = b'{"_type": "https://in-toto.io/Statement/v1"}'


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_key_signed_its_public_key_verifies(tmp_path: Path, kind: str) -> None:
    private, public = keypair(tmp_path, kind)
    content = STATEMENT
    assert signatures.verified(signatures.sign(content, private), public) == content


def test_an_envelope_is_dsse_and_openssl_verifies_it(tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    content = STATEMENT
    envelope = json.loads(signatures.sign(content, private))
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
    envelope = signatures.sign(STATEMENT, private)
    assert signatures.verified(envelope, other) is None
    payload = base64.b64encode(b"another").decode()
    for key, value in (("payload", payload), ("payloadType", "text/plain"), ("signatures", [])):
        assert signatures.verified(json.dumps({**json.loads(envelope), key: value}).encode(), public) is None


def test_what_the_key_signed_as_something_else_is_no_signature_of_a_statement(tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    envelope = Envelope(STATEMENT, "text/plain", {})
    envelope.sign(CryptoSigner(load_pem_private_key(private.read_bytes(), None)))
    assert signatures.verified(json.dumps(envelope.to_dict()).encode(), public) is None


def test_a_signature_under_the_right_keys_name_is_not_enough(tmp_path: Path) -> None:
    private, public = keypair(tmp_path)
    foreign, _ = keypair(tmp_path, "ecdsa")
    content = STATEMENT
    ours, theirs = (json.loads(signatures.sign(content, key)) for key in (private, foreign))
    theirs["signatures"][0]["keyid"] = ours["signatures"][0]["keyid"]
    assert signatures.verified(json.dumps(theirs).encode(), public) is None


@pytest.mark.parametrize(
    "envelope",
    [b"", b"[]", b"{}", b"null", b'{"payload": 1, "payloadType": 2, "signatures": 3}', b"[" * 100_000, b"\xff"],
)
def test_what_is_no_envelope_is_not_verified(tmp_path: Path, envelope: bytes) -> None:
    _, public = keypair(tmp_path)
    assert signatures.verified(envelope, public) is None


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
            signatures.sign(b"", key)
    for key, fact in ((text, "is not an Ed25519"), (private, "is not an Ed25519"), (tmp_path / "none", "cannot read")):
        with pytest.raises(UserError, match=fact):
            signatures.verified(b"", key)
