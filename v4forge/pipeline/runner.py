"""Runs stages of the pipeline, each only when its inputs, settings, pins or code changed; on the host or in its image.

A stage that may read a source that is still being downloaded starts while `fetch` runs beside it
(background_fetch).
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from v4forge import checkout, machine, makefile, pins
from v4forge.checkpoint import incoming
from v4forge.digests import Digests, cache_of
from v4forge.errors import UserError, report
from v4forge.files import changed_json, read_json
from v4forge.images import containers, definitions
from v4forge.images.archive import layer_sizes, step_of
from v4forge.images.jobs import Job
from v4forge.pipeline import events, stamps
from v4forge.pipeline.background_fetch import STOPPED, Fetch, wait_until_ended
from v4forge.pipeline.process import execute, killed
from v4forge.pipeline.run_state import lock_file
from v4forge.pipeline.stages import FILES, TARGETS, Stage
from v4forge.pipeline.stamps import Files

REASONS_SHOWN = 4
READ_ONLY = ("source", "corpus", "heldout")
# The address: torchrun would have its processes meet by this machine's own name, which need not resolve.
LAUNCHER = ("v4forge.pipeline.torchrun", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node")


class StageFailed(Exception):
    """A stage's program has ended with a code that is not 0; it has said why."""

    def __init__(self, stage: str, code: int) -> None:
        super().__init__(stage, code)
        self.stage = stage
        self.code = code


class Runner:
    """Runs stages of `table` in one work folder, `<scratch>/<profile>`. `lock` is the file that this run has locked."""

    def __init__(
        self, values: Mapping[str, Any], table: Mapping[str, Stage], root: Path, lock: Path | None = None
    ) -> None:
        self.values = dict(values)
        self.table = table
        self.root = root
        self.work = Path(values["work"])
        self.lock = lock
        self.digests = Digests(cache_of(self.work))
        self.unsaid: list[str] = []  # about stages that need not run: said once another one runs
        self.seconds: dict[str, float] = {}  # of the stages that ran
        self.fetch: Fetch | None = None  # that runs beside the stages
        self.says_no_revision = False

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

    def record(self, name: str, inputs: Sequence[Files] | None = None) -> stamps.Record:
        stage = self.table[name]
        code = stamps.code_closure(stage.program, self.root)
        if not code:
            raise UserError(f"{name} has no program {stage.program}", "git status: is a file missing?")
        return stamps.record(
            command=[part if isinstance(part, str) else " ".join(part) for part in stage.arguments],
            settings={key: self.values[key] for key in stage.settings},
            pins={key: pins.read().get(key, "") for key in stage.pins},
            inputs=self.files(stage.inputs) if inputs is None else inputs,
            code=code,
            root=self.root,
            digests=self.digests,
        )

    def reasons(self, name: str, now: stamps.Record) -> list[str]:
        """Why a stage of which this is the record would run; none where one that does all of it is up to date."""
        wider = [other for other, stage in self.table.items() if stage.does_all_of == name]
        if any(self.stamp_file(other).exists() and not self.own_reasons(other) for other in wider):
            return []
        outputs = self.files(self.table[name].outputs)
        return stamps.differences(read_json(self.stamp_file(name)), now, outputs, self.digests)

    def own_reasons(self, name: str) -> list[str]:
        """Why the stage would run, whatever the stages before it do."""
        return [] if self.skipped(name) else self.reasons(name, self.record(name))

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

    def shown_command(self, name: str) -> str:
        """The command as a person reads it, and as run.json keeps it: `python` is the environment's or the image's."""
        return " ".join(["python", *self.command(name)[1:]])

    def launched(self, stage: Stage) -> bool:
        """Whether the stage runs as several processes."""
        return stage.parallel and self.values["gpus"] > 1

    @cached_property
    def engine(self) -> containers.Engine:
        return containers.connect()

    @cached_property
    def image(self) -> containers.Image:
        return containers.find(self.engine, definitions.resolve("calib"), definitions.code_sha256())

    @cached_property
    def image_layers(self) -> dict[str, Any]:
        """The image for run.json: what it is, and how large its layers are."""
        sizes = layer_sizes(self.engine.client, self.image.id)
        layers = [{"bytes": size, "step": step_of(created_by)} for size, created_by in sizes]
        return {"id": self.image.id, "lane": self.image.lane, "layers": layers}

    @cached_property
    def machine(self) -> dict[str, Any]:
        """The machine for run.json, asked once a run: NVML may have to wake every GPU first."""
        return machine.facts()

    def revision(self) -> str | None:
        """The checkout's, for run.json; says so, once a run, where git does not tell it of a checkout that there is."""
        found = checkout.told("--untracked-files=no", root=self.root)
        if found.why and (self.root / ".git").exists() and not self.says_no_revision:
            self.says_no_revision = True
            say(f"the revision of this checkout is not known, and not noted: {found.why}")
        return found.revision

    def job(self, name: str) -> Job:
        """The stage in a container, where it can write to the work folder, but not to a source in it."""
        stage = self.table[name]
        reads = [group.path for group in self.files([key for key in stage.inputs if key in READ_ONLY])]
        reads += [Path(self.values[key]) for key in stage.reads if self.values[key]]
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
            beside=name if stage.beside else "",
            lock=self.lock,
            environment={
                "XDG_CACHE_HOME": str(cache),
                "TRITON_CACHE_DIR": str(cache / "triton"),
                "MPLCONFIGDIR": str(cache / "matplotlib"),
                # Imports take twice as long without bytecode, which an image has none of. By image, since Python knows
                # it by the sources' times, and those are the same in all of them.
                "PYTHONPYCACHEPREFIX": str(cache / "bytecode" / self.image.id.removeprefix("sha256:")[:12]),
                "PYTHONDONTWRITEBYTECODE": "",
                **makefile.passed_on(),
                **self.environment(name),
            },
        )

    def environment(self, name: str) -> dict[str, str]:
        """The stage's variables: where its events go, under which name; and, as torchrun sets this one, and says so,
        where it is not set, while the program fixes its threads itself, OMP_NUM_THREADS."""
        told = {events.VARIABLE: str(events.file_of(self.work.absolute())), events.STAGE: name}
        return told | ({"OMP_NUM_THREADS": "1"} if self.launched(self.table[name]) else {})

    def say_unsaid(self) -> None:
        while self.unsaid:
            say(self.unsaid.pop(0))

    def begin_fetch(self, options: Sequence[str]) -> bool:
        """Starts `fetch` beside what follows, where there is something to download, and returns as soon as a stage can
        begin on its first files, or it has ended -> whether there was. `options`: this run's own, for the process that
        downloads. Raises StageFailed."""
        source = Path(self.values["source"])
        if not incoming.live(source) and (self.skipped("fetch") or not self.own_reasons("fetch")):
            return False
        self.say_unsaid()
        log = self.work / "logs" / "fetch.log"
        say(f"fetch: {self.table['fetch'].does}; its log is {log}")
        self.fetch = Fetch.begin(source, lock_file(self.work, ["fetch"]), log, options)
        self.fetch.wait_until_ready()
        if not self.fetch.running():
            self.end_fetch()
        return True

    def end_fetch(self) -> None:
        """Waits for the download that runs beside; StageFailed when it has failed."""
        if self.fetch is None:
            return
        code = self.fetch.wait()
        self.fetch = None
        if code:
            raise StageFailed("fetch", code)
        entry = read_json(self.work / "reports" / "run.json").get("fetch", {})
        self.seconds["fetch"] = float(entry.get("elapsed_s", 0))

    def stop_fetch(self) -> None:
        """Ends the download beside a run that ends early; what had failed by itself says why."""
        fetch, self.fetch = self.fetch, None
        if fetch is not None:
            fetch.stop()

    def run(self, name: str, lock: int) -> bool:
        """Runs the stage unless it is up to date; whether it ran.

        Raises UserError when an input is missing, StageFailed when its program fails.
        """
        if skipped := self.skipped(name):
            self.unsaid.append(f"{name}: {skipped}")
            return False
        stage = self.table[name]
        arrives = "source" in stage.inputs and incoming.live(Path(self.values["source"]))
        if arrives and not stage.streams:
            fact = f"{name} needs the whole source, and {self.values['source']} is still being downloaded"
            hint = f"make status{self.profile_word} shows how far it is; then run the same command again"
            raise UserError(fact, hint)
        inputs = [group for group in self.files(stage.inputs) if not (arrives and group.name == "source")]
        for group in inputs:
            if group.name not in stage.optional and not group.members():
                raise UserError(f"{name} needs {group.path}", self.maker(group.name))
        now = self.record(name, inputs)
        reasons = ["its source is arriving"] if arrives else self.reasons(name, now)
        if not reasons:
            self.unsaid.append(f"{name}: up to date")
            events.emit("up-to-date", name)
            return False
        job = self.job(name) if self.values["runtime"] == "docker" else None
        self.say_unsaid()
        again = f" ({listed(reasons)})" if self.stamp_file(name).exists() else ""
        say(f"{name}: {stage.does.format(**self.values)}{again}")
        clock = time.monotonic()
        elapsed_s = self._execute(name, job, lock)
        if arrives:
            self.end_fetch()
            wait_until_ended(Path(self.values["source"]))
            now["input"] = self.record(name)["input"]  # all of it now; code and settings as they were when it began
        outputs = self.files(stage.outputs)
        for group in outputs:
            if not group.members():
                raise UserError(f"{name} ended without writing {group.path}", f"python -m {stage.program} --help")
        stamps.seal(self.stamp_file(name), now, outputs, self.digests)
        self.seconds[name] = time.monotonic() - clock
        if not stage.concludes:
            say(f"{name}: done in {elapsed_s:.1f} s")
        return True

    def _execute(self, name: str, job: Job | None, lock: int) -> float:
        """Runs the stage's program, in a container where there is a job for it, and notes in run.json how -> seconds.
        Raises StageFailed."""
        entry: dict[str, Any] = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": self.shown_command(name),
            "machine": self.machine,
            "revision": self.revision(),
        }
        if job:
            entry["image"] = self.image_layers
        events.emit("start", name)
        clock = time.monotonic()
        try:
            code = (
                containers.run(self.engine, job)
                if job
                else execute(self.command(name), self.root, lock, self.environment(name))
            )
        except KeyboardInterrupt:
            events.emit("interrupted", name)
            raise
        elapsed_s = round(time.monotonic() - clock, 3)
        if code:
            told: dict[str, Any] = {"elapsed_s": elapsed_s, "code": code}
            if code > 128 and code not in STOPPED:  # it could not say why
                error = killed(name, code - 128)
                report(error)
                told["fact"] = error.fact
            events.emit("interrupted" if code in STOPPED else "failed", name, **told)
            raise StageFailed(name, code)
        events.emit("end", name, elapsed_s=elapsed_s)
        with changed_json(self.work / "reports" / "run.json") as content:
            content[name] = {"elapsed_s": elapsed_s, **entry}
        return elapsed_s

    @property
    def profile_word(self) -> str:
        """What a command of make needs for this profile."""
        return "" if self.values["profile"] == "tiny" else f" PROFILE={self.values['profile']}"

    def maker(self, name: str) -> str:
        """What to do about missing files of this name."""
        profile = self.profile_word
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
