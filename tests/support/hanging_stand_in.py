"""Stands in for `vllm serve` before its watchdog: a server that goes on answering, and an engine, a process of its own,
whose steps are bytes of a file.

What the server does is what the file `does` in the folder of $STAND_IN says: "" answers; "silent" takes a request and
says nothing; "other" has no metrics of an engine. `busy` is there while the engine has requests, `answered` when the
watchdog has had an answer; SIGTERM is ignored.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(os.environ["STAND_IN"])
ENGINE = """
import pathlib, time
while True:
    if pathlib.Path("busy").exists():
        with open("steps", "ab") as steps:
            steps.write(b"x")
    time.sleep(0.02)
"""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return None

    def do_GET(self) -> None:
        does = (FOLDER / "does").read_text() if (FOLDER / "does").exists() else ""
        if does == "silent":
            time.sleep(60)
        steps = (FOLDER / "steps").stat().st_size
        body = f'vllm:num_requests_running{{engine="0"}} {float((FOLDER / "busy").exists())}\n'
        body += f'vllm:generation_tokens_total{{engine="0"}} {steps}.0\n'
        content = b"" if does == "other" else body.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(BrokenPipeError):
            self.wfile.write(content)
        (FOLDER / "answered").touch()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (FOLDER / "steps").touch()
    engine = subprocess.Popen([sys.executable, "-c", ENGINE], cwd=FOLDER)
    (FOLDER / "engine").write_text(str(engine.pid))
    with open(FOLDER / "began", "a") as began:
        began.write("x\n")
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
