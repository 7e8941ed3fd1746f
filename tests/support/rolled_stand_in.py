"""Stands in for `vllm serve`, as a program: `rolled_stand_in.py serve ARTIFACT … --host HOST --port PORT …`. It answers
with the name of the artifact, a folder; a file `faulty` there holds the port of the replica whose start fails."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from worker_stand_in import Worker

if __name__ == "__main__":
    artifact, options = Path(sys.argv[2]), sys.argv[3:]
    host, port = (options[options.index(name) + 1] for name in ("--host", "--port"))
    if (artifact / "faulty").is_file() and (artifact / "faulty").read_text() == port:
        sys.exit("RuntimeError: a tensor is missing")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # which a container's first process has to ask for
    with Worker(int(port), name=artifact.name, host=host).run():
        threading.Event().wait()
