"""The download that runs beside the stage that begins on its first files: a process and a log of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from v4forge import children
from v4forge.checkpoint import incoming
from v4forge.files import is_locked, make_folder

POLL_S = 0.1
SHOWN_LINES = 12
ENDING_S = 5.0  # between the end of what downloads and that of the process which started it
STOPPED = (130, 143)  # codes of a download that somebody stopped, which knows why


@dataclass
class Fetch:
    """A running `fetch`; `process` is None where another terminal has started it. `lock` is held while one runs."""

    source: Path
    lock: Path
    log: Path
    process: subprocess.Popen[bytes] | None

    @classmethod
    def begin(cls, source: Path, lock: Path, log: Path, options: Sequence[str]) -> Fetch:
        """Starts `python -m scripts.stage run fetch` with these options, unless a download runs already.

        Ctrl-C reaches it through the terminal, as it does the stage beside it; when we are killed, it ends too.
        """
        if incoming.live(source) or is_locked(lock):
            return cls(source, lock, log, None)
        make_folder(log.parent)
        with open(log, "wb") as file:
            command = [sys.executable, "-m", "scripts.stage", "run", "fetch", *options]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=children.ending_with_us(),
            )
        return cls(source, lock, log, process)

    def running(self) -> bool:
        if self.process is None:
            return incoming.live(self.source) or is_locked(self.lock)
        return self.process.poll() is None

    def wait_until_ready(self) -> None:
        """Returns when a stage can begin on what is there, or the download has ended. What an earlier one left says
        nothing: only while this one lives is the folder ready."""
        while self.running() and not (incoming.live(self.source) and incoming.ready(self.source)):
            time.sleep(POLL_S)

    def wait(self) -> int:
        """Waits for the end -> the exit code, after showing the end of the log of one that has failed."""
        if self.process is None:
            while self.running():
                time.sleep(POLL_S)
            return 0
        code = self.process.wait()
        code = code if code >= 0 else 128 - code
        if code and code not in STOPPED:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-SHOWN_LINES:]), file=sys.stderr, flush=True)
        return code

    def stop(self) -> None:
        """Ends it, and what it downloads; the next run goes on from there. One that has failed by itself says why."""
        if self.process is None:
            return
        if not incoming.live(self.source):  # what downloads has ended, perhaps in this moment
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDING_S)
        if self.process.poll() is None:
            self.process.terminate()
        self.wait()


def wait_until_ended(source: Path) -> None:
    """Returns when nothing fills the folder any more."""
    while incoming.live(source):
        time.sleep(POLL_S)
