"""A registry in memory, for what loopback's docker-registry is not: with the referrers API, refusing, untrustworthy."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from v4forge.images.oci import INDEX


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


@contextmanager
def serving() -> Iterator[Stored]:
    """A registry on its port until the block ends."""
    with Stored() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
