"""Programs, each in a process that has what they all import: vLLM takes seven seconds, llm-compressor as many.

`python tests/support/forked.py MODULE,… FOLDER PROGRAM…` leaves <program>.out, .err and .code in the folder.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import NoReturn


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
            run()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{program.stem}.code").write_text(str(code))


def run() -> NoReturn:
    """The program of sys.argv, and an end without the two seconds in which Python takes those modules apart."""
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
