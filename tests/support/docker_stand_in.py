"""A docker daemon for tests without one: speaks as much of the API as docker-py asks for to run a short program.

A container is a call of `programs[its first word]` with the body that created it -> its exit code and output.
"""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Program = Callable[[dict[str, Any]], tuple[int, str]]


@dataclass
class Daemon:
    url: str = ""
    api: str = "1.44"
    info: dict[str, Any] = field(
        default_factory=lambda: {"SecurityOptions": ["name=seccomp"], "Runtimes": {"runc": {}}}
    )
    images: dict[str, dict[str, str]] = field(default_factory=dict)  # reference -> labels
    ids: dict[str, str] = field(default_factory=dict)  # reference -> its image's id, where it is another
    programs: dict[str, Program] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    refusal: str = ""  # of every start

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/version":
            return 200, {"Version": "28.0", "ApiVersion": self.api, "MinAPIVersion": "1.24"}
        if path == "/info":
            return 200, self.info
        if match := re.fullmatch(r"/images/(.+)/json", path):
            if match[1] not in self.images:
                return 404, {"message": f"No such image: {match[1]}"}
            labels = self.images[match[1]]
            return 200, {"Id": self.ids.get(match[1], "sha256:0"), "Size": 2**30, "Config": {"Labels": labels}}
        if path == "/containers/create":
            self.created.append(body)
            return 201, {"Id": str(len(self.created) - 1), "Warnings": []}
        match = re.fullmatch(r"/containers/(\d+)(?:/(\w+))?", path)
        assert match, f"{method} {path} is not in the stand-in"
        number, what = int(match[1]), match[2]
        if method == "DELETE":
            self.removed.append(number)
            return 204, None
        if what == "start":
            return (500, {"message": self.refusal}) if self.refusal else (204, None)
        made = self.created[number]
        if what == "json":
            return 200, {"Id": match[1], "Config": {"Tty": False}, "HostConfig": {"LogConfig": {"Type": "json-file"}}}
        if what == "wait":
            made["code"], made["output"] = self.programs[made["Entrypoint"][0]](made)
            return 200, {"StatusCode": made["code"]}
        assert what == "logs", path
        text = made["output"].encode()
        return 200, struct.pack(">BxxxL", 1, len(text)) + text


@contextmanager
def running(daemon: Daemon) -> Iterator[Daemon]:
    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            path = re.sub(r"^/v[\d.]+(?=/)", "", self.path.partition("?")[0])
            status, content = daemon.answer(self.command, path, body)
            sent = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_DELETE = do

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    daemon.url = f"tcp://127.0.0.1:{server.server_port}"
    try:
        yield daemon
    finally:
        server.shutdown()
        server.server_close()
