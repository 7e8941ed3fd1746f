"""The machine as the doctor's checks see it.

Files below a root, commands on a PATH, an environment, GPUs, a file system's size, a clock: all that a check looks at
goes through a Host, so that a test can show each check the condition it is for.
"""

from __future__ import annotations

import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from v4forge import gpus, launched
from v4forge.checkout import ROOT
from v4forge.checkpoint.layout import Config
from v4forge.errors import UserError
from v4forge.gpus import Gpu, Library, Topology
from v4forge.images import containers
from v4forge.outcomes import NotChecked, Outcome, failed, warning
from v4forge.pipeline import requirements
from v4forge.pipeline.doctor import gpu_state
from v4forge.pipeline.doctor.gpu_state import GpuState
from v4forge.pipeline.stages import PROFILES

COMMAND_LIMIT_S = 20.0
INSTALL_DOCKER = "sudo apt-get install docker.io"
JOIN_DOCKER = "sudo usermod -aG docker $USER && newgrp docker"
GRACE_S = 40.0  # torchrun gives its processes 30 s to end

T = TypeVar("T")


@dataclass(frozen=True)
class Ran:
    """How a command ended, and its two outputs."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """The first line of either output."""
        return next((line.strip() for line in (self.out + "\n" + self.err).splitlines() if line.strip()), "")


@dataclass(frozen=True)
class Host:
    """A machine, and the run that is planned for it: the checks ask whether the one can do the other.

    `root` is where /proc, /sys, /dev and /etc are; commands are looked for on the PATH of `environment`. `source` is
    the upstream checkpoint, None for the one that fetch puts into `work`; `corpus` the calibration text, None for the
    profile's or for `data_set`, in the form of hub_rows. `gpus_wanted` share the samples.
    """

    work: Path
    profile: str = "tiny"
    gpus_wanted: int = 1
    runtime: str = ""
    source: Path | None = None
    corpus: Path | None = None
    data_set: str = ""
    samples: int = 0
    seq_len: int = 0
    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    statvfs: Callable[[Path], os.statvfs_result] = os.statvfs
    clock: Callable[[], float] = time.time
    nvml: Library = gpus.library
    user: int = field(default_factory=os.geteuid)
    torch_cuda: str | None = field(default_factory=lambda: torch_cuda())
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _made: dict[str, Future[Any]] = field(default_factory=dict, repr=False)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns or raises, made by the first of several checks that ask; the others wait for it."""
        with self._lock:
            mine = name not in self._made
            future = self._made.setdefault(name, Future())
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)
        found: T = future.result()
        return found

    # The plan.

    @property
    def full_size(self) -> bool:
        """Whether the run is one that cannot do without GPUs and a disk of hundreds of GB."""
        return self.profile != "tiny"

    @property
    def chosen_runtime(self) -> str:
        return self.runtime or PROFILES[self.profile].runtime

    @property
    def tokens(self) -> tuple[int, int]:
        """Calibration samples, and tokens in each."""
        profile = PROFILES[self.profile]
        return self.samples or profile.samples, self.seq_len or profile.seq_len

    @property
    def upstream(self) -> Path | None:
        """A source that is given, by the user or the profile; None where fetch makes it."""
        given = PROFILES[self.profile].source
        return self.source or (ROOT / given if given else None)

    @property
    def settings(self) -> dict[str, Any]:
        """The runner's settings, as far as a plan needs them."""
        samples, seq_len = self.tokens
        source = str(self.upstream or f"{self.work}/upstream")
        return {"work": str(self.work), "source": source, "samples": samples, "seq_len": seq_len}

    def config(self) -> Config:
        """The source's, the published one where fetch has not come that far."""
        return self.once("config", lambda: requirements.config_of(Path(self.settings["source"])))

    def sizes(self) -> requirements.Sizes:
        return self.once("sizes", lambda: requirements.sizes_of(self.config()))

    def share(self, processes: int) -> int:
        """Samples of the process that has the most."""
        return math.ceil(self.tokens[0] / processes)

    def needed(self, fact: str, fix: str) -> Outcome:
        """What the full size cannot do without, and the embedded model can."""
        return failed(fact, fix) if self.full_size else warning(fact, fix)

    def make(self, target: str, *settings: str) -> str:
        """A make command of this run, which differs from it in `settings`."""
        default = PROFILES[self.profile]
        own = {
            "PROFILE": self.profile if self.full_size else "",
            "SCRATCH": str(self.work.parent)
            if self.work.name == self.profile and self.work.parent != ROOT / "scratch"
            else "",
            "RUNTIME": self.runtime if self.runtime != default.runtime else "",
            "GPUS": str(self.gpus_wanted) if self.gpus_wanted > 1 else "",
            "DEVICES": ",".join(map(str, sorted(self.devices()))),
            "SOURCE": str(self.source or ""),
            "CORPUS": str(self.corpus or self.data_set),
            "SAMPLES": str(self.samples or ""),
            "SEQ_LEN": str(self.seq_len or ""),
        }
        changed = {setting.partition("=")[0] for setting in settings}
        kept = [f"{name}={shlex.quote(value)}" for name, value in own.items() if value and name not in changed]
        return " ".join(["make", target, *kept, *settings])

    # The machine.

    def path(self, name: str) -> Path:
        """A path of the machine, such as /proc/meminfo, below the root."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str:
        """A file's text, "" where it cannot be read."""
        try:
            return self.path(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def which(self, program: str) -> str:
        """Where a command is, "" when it is not on the PATH."""
        return shutil.which(program, path=self.environment.get("PATH", os.defpath)) or ""

    def command(
        self,
        words: Sequence[str],
        limit_s: float = COMMAND_LIMIT_S,
        added: Mapping[str, str] | None = None,
    ) -> Ran | None:
        """How a command ends, with `added` in its environment; None where there is no such command.

        Raises UserError for one that does not end in time.
        """
        try:
            process = subprocess.Popen(
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd=ROOT,
                env={**launched.without(self.environment), **(added or {})},
            )
        except OSError:
            return None
        try:
            out, err = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            raise UserError(f"{words[0]} did not answer within {limit_s:.0f} s", " ".join(words)) from None
        return Ran(process.returncode, out, err)

    def gpus(self) -> list[Gpu]:
        """The machine's GPUs. Raises UserError where there are none or their driver does not answer."""
        return self.once("gpus", lambda: gpus.gpus(self.nvml))

    def devices(self) -> set[int]:
        """The GPUs that CUDA_VISIBLE_DEVICES names, by number; none where it does not."""
        named = self.environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        return {int(name) for name in named if name.strip().isdigit()}

    def some_gpus(self) -> list[Gpu]:
        """The GPUs of the run: those that CUDA_VISIBLE_DEVICES names, which DEVICES sets, else all. Raises NotChecked
        where there is none; the check of the driver says why."""
        try:
            found = self.gpus()
        except UserError:
            raise NotChecked("no GPU answers here", "nvidia-smi", "driver") from None
        indexes = self.devices()
        chosen = [gpu for gpu in found if not indexes or gpu.index in indexes]
        if not chosen:
            raise NotChecked(f"{named_gpus(sorted(indexes))} of DEVICES is not here", "nvidia-smi -L")
        return chosen

    def states(self) -> dict[int, GpuState]:
        """What the driver tells of each GPU's state; {} where it tells nothing."""
        try:
            return self.once("states", lambda: gpu_state.states(self.nvml))
        except UserError:
            return {}

    def topology(self) -> Topology:
        """How the GPUs are joined. Raises NotChecked without the program that tells; the driver's check says more."""
        if not self.which("nvidia-smi"):
            raise NotChecked("there is no nvidia-smi", "nvidia-smi", "driver")
        return self.once("topology", lambda: gpus.topology(lambda words: gpus.nvidia_smi(words, self.environment)))

    def engine(self) -> containers.Engine:
        """The docker daemon. Raises UserError, with one command, when none answers."""

        def connect() -> containers.Engine:
            named = self.environment.get("DOCKER_HOST")
            if not self.which("docker") and not named and not self.path("/var/run/docker.sock").exists():
                raise UserError("docker is not installed", INSTALL_DOCKER)
            try:
                return containers.connect(self.environment)
            except UserError as error:
                refused = error.fact.startswith("you may not")
                start = "unset DOCKER_HOST" if named else "sudo systemctl enable --now docker"
                raise UserError(error.fact, JOIN_DOCKER if refused else start) from None

        return self.once("engine", connect)

    def some_engine(self) -> containers.Engine:
        """The docker daemon. Raises NotChecked where none answers; the check of docker says why."""
        try:
            return self.engine()
        except UserError as error:
            raise NotChecked("no docker daemon answers here", error.hint, "docker") from None

    def python(self, *words: str, limit_s: float, added: Mapping[str, str] | None = None) -> Ran:
        """How a program of this interpreter ends, with the checkout's modules."""
        ran = self.command([sys.executable, *words], limit_s, {"PYTHONPATH": str(ROOT), **(added or {})})
        if ran is None:
            raise UserError(f"{sys.executable} cannot be run", "make env")
        return ran


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a command; torchrun ends its processes when it is asked to."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in filter(None, (process.stdout, process.stderr)):
        stream.close()


def torch_cuda() -> str | None:
    """The CUDA that this environment's torch is a build for, None for a build for the CPU: in a file of its own, since
    importing torch takes seconds."""
    torch = find_spec("torch")
    assert torch is not None and torch.origin is not None
    cuda: str | None = runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"]
    return cuda


def numbers(version: str) -> tuple[int, ...]:
    """The numbers in a version, for comparing; () where there are none."""
    return tuple(map(int, re.findall(r"\d+", version)))


def listed(things: Sequence[object], most: int = 4) -> str:
    """The first of them by comma, and how many more there are."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(str, things[:most])) + more


def named_gpus(indexes: Sequence[object]) -> str:
    """GPU 1; GPUs 0, 1 and 2."""
    *first, last = map(str, indexes)
    return f"GPUs {', '.join(first)} and {last}" if first else f"GPU {last}"


def counted_gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count != 1)}"
