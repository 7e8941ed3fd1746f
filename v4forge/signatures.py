"""Signatures of in-toto statements: DSSE envelopes by one key, for images and certificates alike.

What verifies needs `cryptography` alone, which the serve image has; what signs, securesystemslib too. Both are imported
where they are used: the calibration image has neither. https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from v4forge.errors import UserError

PAYLOAD = "application/vnd.in-toto+json"
NEW_KEY = "openssl genpkey -algorithm ed25519 -out sign.pem"
PUBLIC_KEY = "openssl pkey -in sign.pem -pubout -out verify.pem"


def sign(statement: bytes, key: Path) -> bytes:
    """A DSSE envelope over the statement, by the private key (PEM, PKCS8, not encrypted) of a file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib import exceptions
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    try:
        signer = CryptoSigner(load_pem_private_key(key_bytes(key, "SIGN_KEY"), password=None))
    except TypeError:
        raise UserError(f"SIGN_KEY={key} is encrypted", f"openssl pkey -in {key} -out <a file of yours>") from None
    except (ValueError, UnsupportedAlgorithm, exceptions.Error):
        raise unfit_key("SIGN_KEY", key, NEW_KEY) from None
    envelope = Envelope(statement, PAYLOAD, {})
    envelope.sign(signer)
    return (json.dumps(envelope.to_dict(), sort_keys=True) + "\n").encode("utf-8")


def verified(envelope: bytes, key: Path) -> bytes | None:
    """The statement in a DSSE envelope that the public key (PEM) of a file signed; None for any other envelope."""
    signs = _check_of(key)
    try:
        told = json.loads(envelope)
        kind, payload = told["payloadType"], base64.b64decode(told["payload"], validate=True)
        signed = b"DSSEv1 %d %b %d %b" % (len(kind.encode()), kind.encode(), len(payload), payload)
        good = any(signs(base64.b64decode(each["sig"], validate=True), signed) for each in told["signatures"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    return payload if good and kind == PAYLOAD else None


def _check_of(key: Path) -> Callable[[bytes, bytes], bool]:
    """Whether (signature, message) is of the public key in a file: Ed25519, ECDSA by its curve's hash, or RSA-PSS."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    unfit = unfit_key("VERIFY_KEY", key, PUBLIC_KEY)
    try:
        public = load_pem_public_key(key_bytes(key, "VERIFY_KEY"))
    except (ValueError, UnsupportedAlgorithm):
        raise unfit from None
    how: tuple[Any, ...]
    if isinstance(public, ed25519.Ed25519PublicKey):
        how = ()
    elif isinstance(public, rsa.RSAPublicKey):
        how = (padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO), hashes.SHA256())
    elif isinstance(public, ec.EllipticCurvePublicKey) and (size := public.key_size) in (256, 384, 521):
        how = (ec.ECDSA({256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[size]),)
    else:
        raise unfit

    def signs(signature: bytes, message: bytes) -> bool:
        try:
            public.verify(signature, message, *how)
        except InvalidSignature:
            return False
        return True

    return signs


def key_bytes(key: Path, setting: str) -> bytes:
    """The content of a key's file. Raises UserError where it cannot be read."""
    try:
        return key.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {setting}={key}: {error.strerror}", f"make … {setting}=<a PEM file>") from None


def unfit_key(setting: str, key: Path, hint: str) -> UserError:
    """What is said of a file that holds no key of a kind that is used here."""
    return UserError(f"{setting}={key} is not an Ed25519, ECDSA or RSA key in PEM form", hint)
