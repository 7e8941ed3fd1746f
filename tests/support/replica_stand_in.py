"""Stands in for `vllm serve`, as a program, where a bench starts and stops its servers: healthy as the probe asks, and
with answers that stream, to prompts of 32 tokens as far as it tells."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any, ClassVar

import probe_stand_in
from probe_stand_in import Answer

from v4forge.serving import settings
from v4forge.serving.probe import MODEL, MTP

PROMPT_TOKENS = 32
TOKEN_S = 0.002


class Replica(probe_stand_in.StandIn):
    """One replica, whose requests the router has let through, and whose answers it marks. Without drafts it counts
    none."""

    faults: ClassVar[probe_stand_in.Faults] = {}
    key = ""
    name = ""  # that it serves under
    accepted = 0.7
    counted: ClassVar[dict[int, list[float]]] = {0: [0.0, 0.0]}
    speculation = True
    generated = 0.0

    def reply(self, _served: int | None, status: int, text: str) -> None:
        super().reply(None, status, text)

    def healthy(self, replica: int, body: dict[str, Any]) -> Answer | Callable[[Replica], None]:  # type: ignore[override]
        if body.get("stream"):
            return lambda handler: handler.streamed(int(body["max_tokens"]))
        status, text = super().healthy(0, body)
        pages = {
            "/health": "",
            "/version": '{"version": "0"}',
            "/v1/models": json.dumps({"data": [{"id": self.name, "max_model_len": 2048}]}),
            "/metrics": (text if self.speculation else "") + f"vllm:generation_tokens_total {self.generated}\n",
        }
        return status, pages.get(self.path, text)

    def streamed(self, tokens: int) -> None:
        """Half of its drafts are accepted."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for _ in range(tokens):
            time.sleep(TOKEN_S)
            self.event({"choices": [{"index": 0, "text": "a"}]})
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        type(self).generated += tokens
        self.counted[0][0] += tokens / 1.5
        self.counted[0][1] += tokens / 3

    def event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())


def main() -> None:
    Replica.speculation = f"--{settings.DRAFTS}" in sys.argv
    for what in (MODEL, MTP):
        print(f"v4forge: {what}: all 1 parameters filled from 1 tensors", flush=True)
    Replica.name = sys.argv[sys.argv.index("--served-model-name") + 1]
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Replica).serve_forever()


if __name__ == "__main__":
    main()
