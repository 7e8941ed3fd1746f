"""Runs stages of the pipeline, each only when its inputs, settings, pins or code changed; the Makefile calls it.

python -m scripts.stage run calibrate postprocess --profile tiny --scratch scratch
python -m scripts.stage why calibrate --profile tiny --scratch scratch
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from v4forge import containers, images, pins, stamps
from v4forge.errors import UserError, run_main
from v4forge.files import check_writable, read_json, write_json
from v4forge.image_files import layer_sizes, step_of
from v4forge.jobs import Job
from v4forge.stages import FILES, PROFILES, STAGES, TARGETS, Stage
from v4forge.stamps import Digests, Files

ROOT = Path(__file__).resolve().parents[1]
REASONS_SHOWN = 4
READ_ONLY = ("source", "corpus", "heldout")
LAUNCHER = ("torch.distributed.run", "--standalone", "--nproc-per-node")


class Runner:
    """Runs stages of `table` in one work folder, `<scratch>/<profile>`."""

    def __init__(self, values: Mapping[str, Any], table: Mapping[str, Stage], root: Path = ROOT) -> None:
        self.values = dict(values)
        self.table = table
        self.root = root
        self.work = Path(values["work"])
        self.digests = Digests(self.work / ".stamps" / "digests.json")
        self.unsaid: list[str] = []  # about stages that need not run: said once another one runs

    def files(self, names: Sequence[str]) -> list[Files]:
        """The files under these names; one whose setting is empty is left out."""
        groups = []
        for name in names:
            template, without = FILES[name]
            path = template.format(**self.values)
            if path:
                groups.append(Files(name, Path(path), without))
        return groups

    def skipped(self, name: str) -> str:
        """Why there is nothing to run for a stage whatever changed; '' when there may be."""
        if name == "fetch" and self.values["source"] != f"{self.work}/upstream":
            return f"the source is {self.values['source']}"
        return ""

    def stamp_file(self, name: str) -> Path:
        return self.work / ".stamps" / f"{name}.json"

    def record(self, name: str) -> stamps.Record:
        stage = self.table[name]
        code = stamps.code_closure(stage.program, self.root)
        if not code:
            raise UserError(f"{name} has no program {stage.program}", "git status: is a file missing?")
        return stamps.record(
            command=[part if isinstance(part, str) else " ".join(part) for part in stage.arguments],
            settings={key: self.values[key] for key in stage.settings},
            pins={key: pins.read().get(key, "") for key in stage.pins},
            inputs=self.files(stage.inputs),
            code=code,
            root=self.root,
            digests=self.digests,
        )

    def reasons(self, name: str, now: stamps.Record) -> list[str]:
        outputs = self.files(self.table[name].outputs)
        return stamps.differences(read_json(self.stamp_file(name)), now, outputs, self.digests)

    def why(self, name: str) -> list[str]:
        """Lines that say whether the stage would run and why, after the first earlier stage that would."""
        for earlier in self.table[name].after:
            lines = self.why(earlier)
            if not lines[-1].endswith(" is up to date"):
                last = f"{name} would run after {lines[-1].split(' would run')[0]}"
                return [*lines, last] if not self._own_reasons(name) else [*lines, self._own_line(name)]
        return [self._own_line(name)]

    def _own_reasons(self, name: str) -> list[str]:
        return [] if self.skipped(name) else self.reasons(name, self.record(name))

    def _own_line(self, name: str) -> str:
        reasons = self._own_reasons(name)
        return f"{name} would run: {listed(reasons)}" if reasons else f"{name} is up to date"

    def command(self, name: str) -> list[str]:
        stage = self.table[name]
        command = [sys.executable, "-m", stage.program]
        if self.launched(stage):
            command[2:2] = [*LAUNCHER, str(self.values["gpus"]), "-m"]
        for part in stage.arguments:
            if isinstance(part, str):
                command.append(part.format(**self.values))
            elif self.values[part[1]]:
                command += [part[0], str(self.values[part[1]])]
        return command

    def launched(self, stage: Stage) -> bool:
        """Whether the stage runs as several processes."""
        return stage.parallel and self.values["gpus"] > 1

    @cached_property
    def engine(self) -> containers.Engine:
        return containers.connect()

    @cached_property
    def image(self) -> containers.Image:
        return containers.find(self.engine, images.resolve("calib"), images.code_sha256())

    @cached_property
    def image_layers(self) -> dict[str, Any]:
        """The image for run.json: what it is, and how large its layers are."""
        sizes = layer_sizes(self.engine.client, self.image.id)
        layers = [{"bytes": size, "step": step_of(created_by)} for size, created_by in sizes]
        return {"id": self.image.id, "lane": self.image.lane, "layers": layers}

    def job(self, name: str) -> Job:
        """The stage in a container, where it can write to the work folder, but not to a source in it."""
        stage = self.table[name]
        reads = [group.path for group in self.files([key for key in stage.inputs if key in READ_ONLY])]
        uses_gpu = stage.gpu and self.image.lane == "cuda"
        cache = self.work / ".cache"
        return Job(
            image=self.image.id,
            command=["python", *self.command(name)[1:]],
            work=self.work,
            reads=reads,
            gpus=(self.values["gpus"] if self.launched(stage) else 1) if uses_gpu else 0,
            online=stage.downloads == "always" or (stage.downloads != "" and not self.values[stage.downloads]),
            name=f"v4forge-{self.values['profile']}-{name}-{secrets.token_hex(3)}",
            environment={
                "XDG_CACHE_HOME": str(cache),
                "TRITON_CACHE_DIR": str(cache / "triton"),
                "MPLCONFIGDIR": str(cache / "matplotlib"),
                # Imports take twice as long without bytecode, which an image has none of. By image, since Python knows
                # it by the sources' times, and those are the same in all of them.
                "PYTHONPYCACHEPREFIX": str(cache / "bytecode" / self.image.id.removeprefix("sha256:")[:12]),
                "PYTHONDONTWRITEBYTECODE": "",
                **self.environment(stage),
            },
        )

    def environment(self, stage: Stage) -> dict[str, str]:
        """The stage's variables; torchrun sets this one, and says so, where it is not set, and the program fixes its
        threads itself."""
        return {"OMP_NUM_THREADS": "1"} if self.launched(stage) else {}

    def say_unsaid(self) -> None:
        while self.unsaid:
            say(self.unsaid.pop(0))

    def run(self, name: str, lock: int) -> bool:
        """Runs the stage unless it is up to date; whether it ran.

        Raises UserError when an input is missing, SystemExit with the program's code when it fails.
        """
        if skipped := self.skipped(name):
            self.unsaid.append(f"{name}: {skipped}")
            return False
        stage = self.table[name]
        for group in self.files(stage.inputs):
            if not group.members():
                raise UserError(f"{name} needs {group.path}", self._maker(group.name))
        now = self.record(name)
        reasons = self.reasons(name, now)
        if not reasons:
            self.unsaid.append(f"{name}: up to date")
            return False
        job = self.job(name) if self.values["runtime"] == "docker" else None
        again = f" ({listed(reasons)})" if self.stamp_file(name).exists() else ""
        self.say_unsaid()
        say(f"{name}: {stage.does.format(**self.values)}{again}")
        command = self.command(name)
        started, clock = datetime.now(timezone.utc), time.monotonic()
        if job:
            code = containers.run(self.engine, job)
        else:
            code = execute(command, self.root, lock, self.environment(stage))
        elapsed_s = round(time.monotonic() - clock, 3)
        if code:
            sys.exit(code)
        outputs = self.files(stage.outputs)
        for group in outputs:
            if not group.members():
                raise UserError(f"{name} ended without writing {group.path}", f"python -m {stage.program} --help")
        stamps.seal(self.stamp_file(name), now, outputs, self.digests)
        run_file = self.work / "reports" / "run.json"
        shown = " ".join(["python", *command[1:]])
        entry = {"elapsed_s": elapsed_s, "started": started.isoformat(timespec="seconds"), "command": shown}
        if job:
            entry["image"] = self.image_layers
        write_json(run_file, {**read_json(run_file), name: entry})
        if not stage.concludes:
            say(f"{name}: done in {elapsed_s:.1f} s")
        return True

    def _maker(self, name: str) -> str:
        """What to do about missing files of this name."""
        profile = "" if self.values["profile"] == "tiny" else f" PROFILE={self.values['profile']}"
        if name == "source":
            return f"make fetch{profile}" if not self.skipped("fetch") else "make … SOURCE=<an upstream checkpoint>"
        for stage, spec in self.table.items():
            if name in spec.outputs:
                return f"make {stage}{profile}" if stage in TARGETS else "make demo"
        return f"make … {name.upper()}=<file>"


def listed(reasons: Sequence[str]) -> str:
    more = len(reasons) - REASONS_SHOWN
    return "; ".join(reasons[:REASONS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def say(line: str) -> None:
    print(line, flush=True)


def execute(command: Sequence[str], root: Path, lock: int, environment: Mapping[str, str]) -> int:
    """Runs a program to its end and returns its exit code. It inherits the lock, so that no second run can start
    while it lives, and our SIGTERM; Ctrl-C reaches it by itself, through the terminal."""
    environment = {**os.environ, **environment, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, pass_fds=(lock,), env=environment) as program:
        previous = signal.signal(signal.SIGTERM, lambda *_: program.terminate())
        try:
            code = program.wait()
        except KeyboardInterrupt:
            program.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, previous)
    return code if code >= 0 else 128 - code


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the templates of STAGES and FILES are filled with: the profile's values, then the user's."""
    profile = PROFILES[args.profile]
    values: dict[str, Any] = dataclasses.asdict(profile)
    for key in ("source", "corpus", "heldout", "samples", "seq_len", "runtime"):
        if getattr(args, key) not in (None, ""):
            values[key] = getattr(args, key)
    values["profile"], values["seed"], values["gpus"] = args.profile, args.seed, args.gpus
    values["work"] = f"{args.scratch.rstrip('/')}/{args.profile}"
    values["source"] = values["source"] or f"{values['work']}/upstream"
    if values["runtime"] == "docker":  # a program there has another working folder
        for key in ("work", *READ_ONLY):
            values[key] = values[key] and os.path.abspath(values[key])
    return values


def parse(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.stage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "why"))
    parser.add_argument("stages", nargs="+", metavar="stage", help=", ".join(names))
    parser.add_argument("--profile", default="tiny", choices=sorted(PROFILES), help="default: %(default)s")
    parser.add_argument("--scratch", default="scratch", help="where everything is written (default: %(default)s)")
    parser.add_argument("--title", default="", help="name of the whole: one line when nothing of it has to run")
    parser.add_argument("--runtime", choices=("", "host", "docker"), help="default: host for tiny, docker for flash")
    parser.add_argument("--gpus", type=int, default=1, help="processes of calibrate, each on a GPU if there are any")
    parser.add_argument("--source", help="another upstream checkpoint than the profile's")
    parser.add_argument("--corpus", help="another calibration text than the profile's, .jsonl or .txt")
    parser.add_argument("--heldout", help="another text to evaluate on than the profile's")
    parser.add_argument("--samples", type=int, help="calibration samples")
    parser.add_argument("--seq-len", type=int, help="tokens in a sample")
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.gpus < 1:
        parser.error(f"argument --gpus: {args.gpus} is not a number of GPUs")
    for name in args.stages:
        if name not in names:
            parser.error(f"no stage {name!r}; there are: {', '.join(names)}")
    return args


def main(argv: Sequence[str] | None = None, table: Mapping[str, Stage] = STAGES, root: Path = ROOT) -> int:
    args = parse(argv, list(table))
    runner = Runner(settings_of(args), table, root)
    if args.action == "why":
        for name in args.stages:
            print("\n".join(runner.why(name)))
        runner.digests.save()
        return 0

    check_writable(runner.work)
    hint = "wait for it, or give this run a folder of its own: make … SCRATCH=<folder>"
    busy = UserError(f"another run is writing to {runner.work}", hint)
    with stamps.exclusive(runner.work / ".stamps" / "lock", lambda: busy) as lock:
        try:
            ran = [runner.run(name, lock) for name in args.stages]
        finally:
            runner.digests.save()
    if args.title and not any(ran):
        say(f"{args.title}: nothing to do, everything is up to date")
    else:
        runner.say_unsaid()
    return 0


if __name__ == "__main__":
    run_main(main)
