"""A server in the place of vLLM's that answers completions as a test wants: late, wrongly, or not any more."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "stand-in"
Answer = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.say(200, json.dumps({"object": "list", "data": [{"id": MODEL, "max_model_len": 65536}]}))
        else:
            self.say(404, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers.get("Authorization", ""))
        self.server.answer(self, body)

    def say(self, status: int, text: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def complete(self, text: str) -> None:
        choice = {"index": 0, "text": text, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.say(200, json.dumps({"object": "text_completion", "model": MODEL, "choices": [choice]}))


class Server(ThreadingHTTPServer):
    """`asked` are the bodies of the requests so far, `keys` what they authorized themselves with."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, answer: Answer) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that is gone is no news."""


@contextmanager
def serving(answer: Answer, port: int = 0) -> Iterator[Server]:
    server = Server(port, answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def fruit(handler: Handler, _: dict[str, Any]) -> None:
    handler.complete(" There are 27 of them.\n#### 27")


def late(seconds: float) -> Answer:
    def answer(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(seconds)
        fruit(handler, body)

    return answer


def broken(handler: Handler, _: dict[str, Any]) -> None:
    handler.say(500, json.dumps({"error": {"message": "the engine is dead"}}))


def page(handler: Handler, _: dict[str, Any]) -> None:
    handler.say(200, "<html>maintenance</html>", "text/html")


def other_json(handler: Handler, _: dict[str, Any]) -> None:
    handler.say(200, json.dumps({"choices": [{"nothing": True}]}))


def garbage(handler: Handler, _: dict[str, Any]) -> None:
    handler.say(200, '{"choices": [{"text": "\x00\x01', "application/json")


def broken_off(handler: Handler, _: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def dying(after: int) -> Answer:
    """Answers so many requests, then closes the port and breaks every connection off."""

    def answer(handler: Handler, body: dict[str, Any]) -> None:
        server = handler.server
        if len(server.asked) <= after:
            fruit(handler, body)
            return
        server.socket.close()
        handler.close_connection = True

    return answer
