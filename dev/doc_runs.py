"""Runs the commands of the pages in a copy of the checkout, each as doc_commands.RULES has it, and says what came."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock

from dev.doc_commands import PLACEHOLDER, SYNTAX, USAGE, Command, Step, commands, steps, unfilled
from v4forge import checkout
from v4forge.errors import UserError

LIMIT_S = 600.0
SHOWN = 12  # lines of the output of a command that failed
ENVIRONMENTS = (".venv", ".venv-serve-cpu")
# Nobody listens there: no command of a page reaches a hub, and none that has to fails for it.
ADDED = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}
COMMIT = ("-c", "user.name=docs-check", "-c", "user.email=docs-check@localhost", "-c", "commit.gpgsign=false", "commit")
PROGRAM = re.compile(r"-m ((?:scripts|dev|benchmarks)\.\w+)([^;&|\n]*)")
OPTION = re.compile(r"(?<!\S)(--[a-z][\w-]*)")
ANY_OPTION = re.compile(r"--[a-z][\w-]*")
Words = tuple[str, ...]  # a module and what stands before --help, if anything does
Named = tuple[str, list[tuple[str, str]]]
# Each argument is a program with its words: what it says to --help, "" where it has none, all as JSON in the last line.
# In one process, so that what they share, seconds of torch with some, is imported once.
HELPS = """
import contextlib, io, json, runpy, sys
found = []
for line in sys.argv[1:]:
    module, *words = line.split()
    sys.argv = [module, *words, "--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except Exception:
        code = 1
    found.append("" if code else said.getvalue())
print("\\n" + json.dumps(found))
"""


@dataclass(frozen=True)
class Outcome:
    """What came of a step: its seconds, what is wrong, "" for nothing; `same`: the command that was run for both."""

    step: Step
    seconds: float
    fault: str
    same: Command | None = None

    def line(self) -> str:
        command = self.step.command
        where = f"{command.page}:{command.line}"
        took = f"as line {self.same.line} of {self.same.page}" if self.same else f"{self.seconds:.1f} s"
        end = f"failed: {self.fault.splitlines()[0]}" if self.fault else "ok"
        return f"{where:<28} {self.step.how:<8} {command.text}  ({took})  {end}"


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A copy of the checkout, of what git does not ignore, committed, with its environments; removed in the end."""
    with tempfile.TemporaryDirectory(prefix="v4forge-docs-") as name:
        copy = Path(name) / "checkout"
        for file in checkout.names(root):
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / file, copy / file)
        for environment in ENVIRONMENTS:
            if (root / environment).is_dir():
                (copy / environment).symlink_to(root / environment)
        for words in (["init", "-q"], ["add", "--all"], [*COMMIT, "-q", "-m", "the checkout"]):
            done = subprocess.run(["git", *words], cwd=copy, capture_output=True, text=True)
            if words[0] == "init":  # a link is no folder, which is what .gitignore names
                (copy / ".git" / "info" / "exclude").write_text("".join(f"/{name}\n" for name in ENVIRONMENTS))
            if done.returncode:
                raise UserError(f"git {words[0]} failed in a copy: {done.stderr.strip()}", "git --version")
        yield copy


def _key(step: Step) -> str:
    return f"{step.how} {step.run}"


class Runs:
    """The commands of pages in one copy of the checkout; one that was run already is not run again."""

    def __init__(self, copy: Path) -> None:
        self.copy = copy
        self.done: dict[str, Outcome] = {}
        self._ahead: dict[str, Future[Outcome]] = {}
        self._told: dict[str, Named] = {}
        self._help: dict[Words, str] = {}
        self._asking = Lock()

    @cached_property
    def environment(self) -> dict[str, str]:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "V4FORGE", "MFLAGS")) and k != "PYTHONPATH"
        }
        return kept | ADDED

    def pages(self, texts: Mapping[str, str]) -> Iterator[Outcome]:
        """What came of each command of the pages, in their order. Those that need nothing of others run beside them,
        on the cores that one command leaves."""
        found = [step for page, text in texts.items() for command in commands(page, text) for step in steps(command)]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as beside:
            try:
                beside.submit(self._ask_all, [step.run for step in found if step.how == USAGE])
                for step in found:
                    if step.beside and _key(step) not in self._ahead:
                        self._ahead[_key(step)] = beside.submit(self._timed, step)
                for step in found:
                    yield self.outcome(step)
            finally:
                beside.shutdown(wait=False, cancel_futures=True)

    def outcome(self, step: Step) -> Outcome:
        if before := self.done.get(_key(step)):
            return Outcome(step, 0.0, before.fault, before.step.command)
        ahead = self._ahead.get(_key(step))
        self.done[_key(step)] = found = ahead.result() if ahead else self._timed(step)
        return found

    def _timed(self, step: Step) -> Outcome:
        started = time.monotonic()
        fault = self._fault(step)
        return Outcome(step, time.monotonic() - started, fault)

    def _fault(self, step: Step) -> str:
        """What is wrong with a step, with the first lines of what it said; "" for nothing."""
        if step.rule is None:
            return "no rule of dev/doc_commands.py covers it"
        if left := unfilled(step):
            return f"{left[0]} stands for nothing: VALUES in dev/doc_commands.py"
        if step.how == USAGE:
            return self._usage(step.run)
        if step.how == SYNTAX:
            return self._said(["bash", "-n", "-c", step.run])
        return self._said(["bash", "-eu", "-o", "pipefail", "-c", step.run], step.rule.says)

    def _said(self, words: list[str], says: str = "") -> str:
        code, output = self._run(words)
        raised = re.search(r"(?m)^Traceback \(most recent call last\)", output)
        if not raised and (not code or (says and re.search(says, output))):
            return ""
        first = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in first if line.startswith("error: ")] or first[-1:] or ["it said nothing"]
        return "\n".join([f"exit code {code}, {errors[0]}", *first[-SHOWN:]])

    def _run(self, words: list[str]) -> tuple[int, str]:
        """Exit code and output of a command in the copy; all that it started ends with it."""
        process = subprocess.Popen(
            words,
            cwd=self.copy,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return 124, f"{output}\nerror: it still ran after {LIMIT_S:.0f} s"
        return process.returncode, output

    def _usage(self, text: str) -> str:
        """Whether the target, the program and the options of a command exist; nothing of it is run."""
        fault, programs = self._named(text)
        self._ask(form for module, rest in programs for form in _forms(module, rest))
        for module, rest in programs:
            known = {option for form in _forms(module, rest) for option in ANY_OPTION.findall(self._help[form])}
            if not known:
                return f"{module} has no --help"
            if unknown := sorted(set(OPTION.findall(rest)) - known):
                return f"{module} has no option {unknown[0]}"
        return fault

    def _named(self, text: str) -> Named:
        """What is wrong with a command's target or file, "" for nothing; its programs, each with the words after it."""
        if text not in self._told:
            self._told[text] = self._look_up(text)
        return self._told[text]

    def _look_up(self, text: str) -> Named:
        text = PLACEHOLDER.sub("placeholder", text)
        if text.startswith("make "):
            code, expanded = self._run(["make", "-n", *shlex.split(text)[1:]])
            if code:
                return f"make -n: {expanded.strip()}", []
            text = expanded
        elif missing := [word for word in text.split() if word.endswith(".py") and not (self.copy / word).is_file()]:
            return f"there is no {missing[0]}", []
        return "", PROGRAM.findall(text)

    def _ask_all(self, texts: Sequence[str]) -> None:
        """Asks at once for what the lines of USAGE need of their programs."""
        named = [program for text in texts for program in self._named(text)[1]]
        self._ask(form for module, rest in named for form in _forms(module, rest))

    def _ask(self, forms: Iterable[Words]) -> None:
        """Has each of these programs asked for its --help, unless it was."""
        with self._asking:
            new = [form for form in dict.fromkeys(forms) if form not in self._help]
            if new:
                _, said = self._run([".venv/bin/python", "-c", HELPS, *map(" ".join, new)])
                self._help |= zip(new, json.loads(said.splitlines()[-1]), strict=True)


def _forms(module: str, rest: str) -> list[Words]:
    """The program alone, and with its first word, which may be one of its commands."""
    words = rest.split()
    return [(module,), *([(module, words[0])] if words and words[0].isalpha() else [])]
