"""Registries on loopback for the tests: docker-registry, with a password or tokens, and one that takes no artifacts."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from v4forge.images.oci import INDEX, MANIFESTS

USER, PASSWORD = "forger", "s3cret"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@dataclass
class Server:
    """docker-registry on a free port of 127.0.0.1, with its storage under `folder`."""

    folder: Path
    settings: str = ""
    host: str = ""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        program = shutil.which("docker-registry")
        assert program, "apt-get install docker-registry"
        if not self.host:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.host = f"127.0.0.1:{free.getsockname()[1]}"
        config = self.folder / "config.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {self.folder}/data}}}}\n"
            f"http: {{addr: '{self.host}'}}\n{self.settings}",
            encoding="utf-8",
        )
        self.process = subprocess.Popen(
            [program, "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=1)
                return
            except urllib.error.HTTPError:
                return  # it asks for a password
            except OSError:
                time.sleep(0.05)
        raise AssertionError("docker-registry does not answer")

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def blob(self, digest: str) -> Path:
        """The file that holds the bytes of a blob or manifest."""
        value = digest.removeprefix("sha256:")
        return self.folder / f"data/docker/registry/v2/blobs/sha256/{value[:2]}/{value}/data"


def guarded_by_password(folder: Path) -> Iterator[str]:
    """Settings of a registry that asks for USER and PASSWORD itself."""
    bcrypt = "$2b$05$7oVILbFIqhywheySGt3it.98M4Mgvo93uBYU8Z6v3JUqOyQIidXke"
    (folder / "htpasswd").write_text(f"{USER}:{bcrypt}\n", encoding="utf-8")
    yield f"auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n"


def guarded_by_token(folder: Path) -> Iterator[str]:
    """Settings of a registry that asks for a token, as the public ones do, and the server that gives tokens."""
    key, certificate = folder / "token.key", folder / "token.crt"
    subject = ("-subj", "/CN=test", "-keyout", key, "-out", certificate)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject], check=True, capture_output=True
    )
    private = load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, RSAPrivateKey)

    def token(scope: str) -> str:
        now = int(time.time())
        kind, name, actions = scope.split(":")
        access = [{"type": kind, "name": name, "actions": actions.split(",")}]
        times = {"exp": now + 60, "nbf": now - 60, "iat": now}
        chain = ["".join(certificate.read_text(encoding="utf-8").splitlines()[1:-1])]
        parts = (
            {"typ": "JWT", "alg": "RS256", "x5c": chain},
            {"iss": "test", "sub": USER, "aud": "test", "jti": scope, "access": access, **times},
        )
        signed = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
        signature = private.sign(signed.encode(), PKCS1v15(), SHA256())
        return signed + "." + base64.urlsafe_b64encode(signature).decode().rstrip("=")

    class Tokens(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Authorization"] == f"Basic {BASIC}"
            scope = parse_qs(urlparse(self.path).query).get("scope", ["repository:none:pull"])[0]
            content = json.dumps({"token": token(scope)} if known else {}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Tokens) as tokens:
        threading.Thread(target=tokens.serve_forever, kwargs={"poll_interval": 0.01}).start()
        realm = f"http://127.0.0.1:{tokens.server_address[1]}/token"
        yield f"auth: {{token: {{realm: '{realm}', service: test, issuer: test, rootcertbundle: {certificate}}}}}\n"
        tokens.shutdown()


class Plain(BaseHTTPRequestHandler):
    """What stands before a registry to make it one that takes images and no artifacts."""

    protocol_version = "HTTP/1.1"
    behind = ""

    def body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def forward(self) -> None:
        content = self.body()
        if self.command == "PUT" and self.headers["Content-Type"] in (MANIFESTS[0], INDEX):
            self.send_response(415, "no artifacts here")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        connection = http.client.HTTPConnection(self.behind)
        passed = {name: value for name, value in self.headers.items() if name != "Transfer-Encoding"}
        connection.request(self.command, self.path, content, passed | {"Content-Length": str(len(content))})
        answer = connection.getresponse()
        received = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(received)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = forward

    def log_message(self, format: str, *arguments: Any) -> None:
        pass
