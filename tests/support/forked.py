"""Programs, each in a process that has what they all import: vLLM takes seven seconds, llm-compressor as many.

`python tests/support/forked.py MODULE,… FOLDER PROGRAM…` leaves <program>.out, .err and .code in the folder.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    folder, *programs = map(Path, sys.argv[2:])
    sys.path[0] = str(programs[0].parent)  # where python puts it for them
    os.environ.update(VLLM_PLUGINS="", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")  # as they do
    for name in sys.argv[1].split(","):
        importlib.import_module(name)
    for program in programs:
        if (child := os.fork()) == 0:
            for number, suffix in ((1, ".out"), (2, ".err")):
                os.dup2(os.open(folder / f"{program.stem}{suffix}", os.O_WRONLY | os.O_CREAT), number)
            sys.argv = [str(program)]
            runpy.run_path(sys.argv[0], run_name="__main__")
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{program.stem}.code").write_text(str(code))


if __name__ == "__main__":
    main()
