"""Stages and shells in containers, as a person at a terminal meets them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest
from staged import Project

pytestmark = pytest.mark.images


class Terminal:
    """A terminal of 33 x 77 in which a command runs."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(command[0], command, environment)
        self.resize(33, 77)
        self.seen = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def until(self, text: str) -> None:
        """Reads on until `text` appears."""
        deadline = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self.file], [], [], 1)[0]:
                self.seen += os.read(self.file, 4096).decode()

    def end(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.file)
        return code


def test_on_a_terminal_the_program_has_one_of_its_size_and_ctrl_c_ends_it(project: Project) -> None:
    project.task(
        """
        import os, sys, time
        print(sys.stdout.isatty(), sys.stderr.isatty(), os.environ["TERM"], flush=True)
        while True:
            print(tuple(os.get_terminal_size()), flush=True)
            time.sleep(0.2)
        """
    )
    terminal = Terminal(project.command(), project.folder, project.environment(TERM="vt100"))
    terminal.until("True True vt100")
    terminal.until("(77, 33)")
    terminal.resize(20, 50)
    terminal.until("(50, 20)")
    terminal.type("\x03")
    assert terminal.end() == 130


def test_a_shell_sees_what_a_stage_sees(project: Project) -> None:
    code = f"""
        from pathlib import Path
        from v4forge.images import containers
        from v4forge.images.jobs import Job
        folders = {{"work": Path("scratch/a,b"), "reads": [Path("source")]}}
        job = Job({project.image!r}, ["bash"], **folders, environment={{"X": "secret"}})
        containers.shell(containers.connect(), job)
    """
    (project.folder / "scratch/a,b").mkdir(parents=True)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    typed = f"""
        id -u; echo $X; hostname; ls /sys/class/net
        cd '{project.folder}'; touch 'scratch/a,b/made'; touch source/made || echo kept
        exit 3
    """
    run = subprocess.run(
        command, input=typed, cwd=project.folder, env=project.environment(), capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.split()) == (3, [str(os.getuid()), "secret", "localhost", "lo", "kept"])
    assert (project.folder / "scratch/a,b/made").stat().st_uid == os.getuid()

    terminal = Terminal(command, project.folder, project.environment())
    terminal.until("localhost:")  # the prompt
    terminal.type("until [ \"$(stty size)\" = '33 77' ]; do sleep 0.1; done; tty; exit 4\n")
    terminal.until("/dev/pts/0")
    assert terminal.end() == 4
