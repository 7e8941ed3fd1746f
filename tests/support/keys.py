"""Pairs of keys, as a user makes them with openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

KINDS = {
    "ed25519": ("-algorithm", "ed25519"),
    "ecdsa": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
    "ecdsa384": ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"),
    "rsa": ("-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
}


def keypair(folder: Path, kind: str = "ed25519") -> tuple[Path, Path]:
    private, public = folder / f"{kind}.pem", folder / f"{kind}.pub"
    options = {"check": True, "capture_output": True}
    subprocess.run(["openssl", "genpkey", *KINDS[kind], "-out", private], **options)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], **options)
    return private, public
