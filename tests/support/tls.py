"""A certificate authority of the tests' own, and certificates of it for this machine."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM


class Authority:
    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the tests")])
        built = self._built(self.name, self.key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
        self.certificate = built.sign(self.key, hashes.SHA256())

    def _built(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, of: x509.ExtensionType
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self.name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day)
        return builder.not_valid_after(now + day).add_extension(of, critical=isinstance(of, x509.BasicConstraints))

    def write(self, folder: Path) -> Path:
        """Its own certificate, which clients trust."""
        (folder / "ca.pem").write_bytes(self.certificate.public_bytes(PEM))
        return folder / "ca.pem"

    def issue(self, folder: Path, passphrase: bytes = b"") -> tuple[Path, Path]:
        """A new certificate for 127.0.0.1 and its key, in cert.pem and key.pem."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "this machine")])
        certificate = self._built(name, key.public_key(), names).sign(self.key, hashes.SHA256())
        (folder / "cert.pem").write_bytes(certificate.public_bytes(PEM))
        sealed = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        (folder / "key.pem").write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, sealed))
        return folder / "cert.pem", folder / "key.pem"
