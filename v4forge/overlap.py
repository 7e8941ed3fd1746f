"""The download that runs beside the stage that begins on its first files: a process and a log of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from v4forge import arriving
from v4forge.files import make_folder

POLL_S = 0.1
SHOWN_LINES = 12


@dataclass
class Fetch:
    """A running `fetch`; `process` is None where another terminal has started it."""

    source: Path
    log: Path
    process: subprocess.Popen[bytes] | None

    @classmethod
    def begin(cls, source: Path, log: Path, options: Sequence[str]) -> Fetch:
        """Starts `python -m scripts.stage run fetch` with these options, unless a download runs already.

        Ctrl-C reaches it through the terminal, as it does the stage beside it.
        """
        if arriving.live(source):
            return cls(source, log, None)
        make_folder(log.parent)
        with open(log, "wb") as file:
            command = [sys.executable, "-m", "scripts.stage", "run", "fetch", *options]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        return cls(source, log, process)

    def running(self) -> bool:
        return arriving.live(self.source) if self.process is None else self.process.poll() is None

    def wait_until_ready(self) -> None:
        """Returns when a stage can begin on what is there, or the download has ended. What an earlier one left says
        nothing: only while this one lives is the folder ready."""
        while self.running() and not (arriving.live(self.source) and arriving.ready(self.source)):
            time.sleep(POLL_S)

    def wait(self) -> int:
        """Waits for the end -> the exit code, after showing the end of the log where it is not 0."""
        if self.process is None:
            wait_until_ended(self.source)
            return 0
        code = self.process.wait()
        if code:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-SHOWN_LINES:]), file=sys.stderr, flush=True)
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Ends it, and what it downloads; the next run goes on from there."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def wait_until_ended(source: Path) -> None:
    """Returns when nothing fills the folder any more."""
    while arriving.live(source):
        time.sleep(POLL_S)
