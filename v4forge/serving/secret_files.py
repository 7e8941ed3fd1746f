"""What only who serves may read: the file of API keys, and the certificate with its key."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from tempfile import TemporaryDirectory

from v4forge.errors import UserError
from v4forge.files import atomic_path, make_folder, writing


def write(path: Path, text: str, owner: int | None = None) -> None:
    """Writes a file, whole or not at all, in a folder of its own; `owner`: whom both belong to, us where it is None."""
    make_folder(path.parent)
    with atomic_path(path) as temporary, writing(path):
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        temporary.write_text(text, encoding="utf-8")
        os.chmod(path.parent, 0o700)
        if owner is not None:
            for each in (temporary, path.parent):
                os.chown(each, owner, owner)


def read(path: str, what: str, hint: str) -> str:
    """A file's text. Raises UserError, with what is in no message but its name."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{what} cannot be read: {path}: {error.strerror}", hint) from None
    except UnicodeDecodeError:
        raise UserError(f"{what} cannot be read: {path} is no text", hint) from None


def certificate(cert: str, key: str) -> str:
    """The certificate, with those that vouch for it, and its key in one PEM, as haproxy reads them; `key` is "" where
    `cert` has both. Raises UserError where the two do not belong together."""
    hint = "make serve CERT=<certificates, PEM> KEY=<their key, PEM, without a passphrase>"
    parts = [read(path, "the certificate", hint).rstrip("\n") + "\n" for path in (cert, key) if path]
    with TemporaryDirectory() as folder:  # of mode 700
        whole = Path(folder) / "both.pem"
        whole.write_text("".join(parts), encoding="utf-8")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(whole, password=lambda: "")
        except (ssl.SSLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or "it has a passphrase"
            fact = f"{cert} and {key or 'the key in it'} are no certificate with its key: {reason}"
            raise UserError(fact, hint) from None
    return "".join(parts)
