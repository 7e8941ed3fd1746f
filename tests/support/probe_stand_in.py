"""What a probe sees of two replicas behind the router, healthy or with the fault that a test asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from v4forge.serving.agreement import TOKENS
from v4forge.serving.client import PIN

MODEL = "flash"

Answer = tuple[int, str]
Faults = dict[tuple[int, str], Callable[[dict[str, Any]], Any]]


class StandIn(BaseHTTPRequestHandler):
    """Answers as two healthy replicas behind the router would, but for the faults: (replica, path) -> from the body
    of a request to an answer, or to a function that writes it."""

    disable_nagle_algorithm = True
    faults: Faults
    key: str
    accepted: float  # share of drafts, one token each
    counted: dict[int, list[float]]  # by replica: drafts, accepted

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else {}
        replica = int(self.headers.get(PIN, 0))
        if self.key and self.path.startswith("/v1") and self.headers.get("Authorization") != f"Bearer {self.key}":
            return self.reply(replica, 401, '{"error": "Unauthorized"}')
        fault = self.faults.get((replica, self.path))
        answer = fault(body) if fault else self.healthy(replica, body)
        if callable(answer):
            answer(self)
        else:
            self.reply(replica, *answer)

    do_POST = do_GET

    def reply(self, served: int | None, status: int, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        if served is not None:
            self.send_header(PIN, str(served))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def healthy(self, replica: int, body: dict[str, Any]) -> Answer:
        if self.path == "/v1/models":
            return 200, json.dumps({"data": [{"id": MODEL}]})
        if self.path in ("/invocations", "/tokenize"):
            return 404, '{"error": {"message": "nothing is served here"}}'
        if self.path == "/metrics":
            drafts, accepted = self.counted[replica]
            return 200, metrics(drafts, accepted)
        if self.path == "/v1/completions":
            drafts = TOKENS / (1 + self.accepted)
            self.counted[replica][0] += drafts
            self.counted[replica][1] += drafts * self.accepted
            return 200, completed(tokens_of(body["prompt"]))
        if body.get("tools"):
            call = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
            return 200, json.dumps({"choices": [{"message": {"content": None, "tool_calls": [call]}}]})
        return 200, json.dumps({"choices": [{"message": {"content": "9.9", "reasoning": "Let us see."}}]})

    def log_message(self, format: str, *args: Any) -> None:
        pass


def metrics(drafts: float, accepted: float, started_s: float = 1000.0) -> str:
    values = {
        "drafts_total": drafts,
        "draft_tokens_total": drafts,
        "accepted_tokens_total": accepted,
        'accepted_tokens_per_pos_total{position="0"}': accepted,
    }
    rows = (f"vllm:spec_decode_num_{name} {value}" for name, value in values.items())
    return "\n".join((f"process_start_time_seconds {started_s}", *rows)) + "\n"


def tokens_of(prompt: str) -> list[int]:
    return [(len(prompt) * (i + 1)) % 1000 for i in range(TOKENS)]


def completed(tokens: list[int], second: float = -3.0) -> str:
    """The completions endpoint's answer: each token at -0.5, the id after it at `second`."""
    told = {
        "tokens": [f"token_id:{token}" for token in tokens],
        "token_logprobs": [-0.5] * len(tokens),
        "top_logprobs": [{f"token_id:{token}": -0.5, f"token_id:{token + 1}": second} for token in tokens],
    }
    return json.dumps({"choices": [{"logprobs": told}]})


@contextmanager
def serving() -> Iterator[ThreadingHTTPServer]:
    handler = type(
        "Handler", (StandIn,), {"faults": {}, "key": "", "accepted": 0.7, "counted": {i: [5.0, 3.0] for i in (0, 1)}}
    )
    found = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found.daemon_threads = True
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def fault(server: ThreadingHTTPServer, replica: int, path: str, answer: Callable[[dict[str, Any]], Any]) -> None:
    server.RequestHandlerClass.faults[replica, path] = answer  # type: ignore[attr-defined]
