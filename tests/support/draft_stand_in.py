"""vLLM as the draft bench sees it: answers, counters, and the faults that a test asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from v4forge.bench.served_model import Target
from v4forge.serving.client import Endpoint


class Server(ThreadingHTTPServer):
    """vLLM with k = 2, as far as the bench sees it: each answer counts drafts that its length tells."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.daemon_threads = True
        self.asked: list[dict[str, Any]] = []
        self.faults: dict[int, Callable[[Handler], None]] = {}  # by request, from 0
        self.counts: dict[str, Any] = {"generation_tokens": 7, "drafts": 5, "draft_tokens": 10, "at": [4, 1]}
        self.started_s = 1000.0
        self.running = 0
        self.hidden = 0  # readings that do not yet see what was counted last
        self.shown = ""
        self.speculation = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that did not wait is none. To show a traceback in a thread may end pytest, which shows its own."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def target(self, artifact: dict[str, Any] | None = None) -> Target:
        return Target(self.url, "m", [Endpoint(0, self.url, pinned=False)], {"artifact": artifact})

    def count(self, tokens: int) -> None:
        drafts = tokens // 2
        self.counts["generation_tokens"] += tokens
        self.counts["drafts"] += drafts
        self.counts["draft_tokens"] += 2 * drafts - 1
        self.counts["at"][0] += drafts - 2
        self.counts["at"][1] += drafts - 4

    def metrics(self) -> str:
        rows = [f"process_start_time_seconds {self.started_s}", f"vllm:num_requests_running {self.running}"]
        rows += ["vllm:num_requests_waiting 0", f"vllm:generation_tokens_total {self.counts['generation_tokens']}"]
        if self.speculation:
            rows += [f"vllm:spec_decode_num_{name}_total {self.counts[name]}" for name in ("drafts", "draft_tokens")]
            rows.append(f"vllm:spec_decode_num_accepted_tokens_total {sum(self.counts['at'])}")
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            rows += [f'{name}{{position="{at}"}} {value}' for at, value in enumerate(self.counts["at"])]
        return "\n".join(rows) + "\n"


class Handler(BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    server: Server

    def reply(self, text: str, status: int = 200) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self.reply(json.dumps({"data": [{"id": "m", "max_model_len": 4096}]}))
        if self.path == "/version":
            return self.reply('{"version": "0"}')
        if self.server.hidden:
            self.server.hidden -= 1
        else:
            self.server.shown = self.server.metrics()
        self.reply(self.server.shown)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = len(self.server.asked)
        self.server.asked.append(body)
        if fault := self.server.faults.get(number):
            return fault(self)
        self.answer(body["max_tokens"])

    def answer(self, tokens: int, counted: int | None = None) -> None:
        self.server.count(tokens if counted is None else counted)
        asked = self.server.asked[-1]
        prompt = asked["prompt"] if isinstance(asked.get("prompt"), list) else [1, 2, 3]
        choice = {"token_ids": list(range(tokens)), "prompt_token_ids": prompt}
        self.reply(json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}}))

    def log_message(self, format: str, *args: Any) -> None:
        pass
