"""Stands in for `vllm serve` in tests of what drives one: its endpoints, with a rule instead of a model.

Behind token t comes t + 1, with certainty; all drafts are accepted. `--max-num-seqs` ends it, as a wrong setting does.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

K = int(sys.argv[sys.argv.index("--speculative-config.num_speculative_tokens") + 1]) if "mtp" in sys.argv else 0
COUNTS = {"steps": 0}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return None

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        steps = COUNTS["steps"]
        lines = [
            "# TYPE vllm:spec_decode_num_drafts counter",
            f'vllm:spec_decode_num_drafts_total{{engine="0"}} {steps}.0',
        ]
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        lines.append(f"# TYPE {name} counter")
        lines += [f'{name}_total{{engine="0",position="{place}"}} {steps}.0' for place in range(K)]
        pages = {"/health": "", "/version": '{"version": "0"}', "/metrics": "\n".join(lines if K else []) + "\n"}
        self.answer(pages[self.path].encode())

    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("chat/completions"):
            message = {"content": "a", "reasoning": None}
            self.answer(json.dumps({"choices": [{"message": message}], "usage": {"completion_tokens": 1}}).encode())
            return
        tokens = [asked["prompt"][-1] + 1 + i for i in range(asked["max_tokens"])]
        step = K + 1
        pieces = [tokens[:1], *(tokens[at : at + step] for at in range(1, len(tokens), step))]
        COUNTS["steps"] += len(pieces) - 1 if K else 0
        if asked.get("stream"):
            self.answer(b"".join(event({"choices": [{"token_ids": piece}]}) for piece in pieces) + b"data: [DONE]\n\n")
            return
        logprobs = {
            "token_logprobs": [0.0 for _ in tokens],
            "top_logprobs": [{f"token_id:{token}": 0.0} for token in tokens],
        }
        usage = {"completion_tokens": len(tokens)}
        self.answer(json.dumps({"choices": [{"token_ids": tokens, "logprobs": logprobs}], "usage": usage}).encode())


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


if __name__ == "__main__":
    if "--max-num-seqs" in sys.argv:
        print("max-num-seqs must be positive")
        sys.exit(3)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
