"""A project of one stage for the tests of containers: its program does what task.py in the source says, and is in an
image of its own. As a program, scripts.stage on that project."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from container_log import problems

from scripts import stage
from v4forge.errors import run_main
from v4forge.images.containers import Engine
from v4forge.images.jobs import RUN_LABEL
from v4forge.pipeline.stages import Stage

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import argparse
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--source", type=Path)
parser.add_argument("--work", type=Path)
args = parser.parse_args()
args.work.mkdir(parents=True, exist_ok=True)
(args.work / "layer-00.safetensors").write_text("made")
exec((args.source / "task.py").read_text(), {"source": args.source, "work": args.work})
"""
TABLE = {
    name: Stage(
        program="scripts.probe",
        does="the task",
        arguments=("--source", "{source}", "--work", "{work}/layers"),
        inputs=("source",),
        outputs=("layers",),
        gpu=gpu,
        downloads=downloads,
    )
    for name, gpu, downloads in (("calibrate", True, ""), ("fetch-like", False, "always"))
}
DOCKERFILE = """
FROM {base}
RUN apt-get update -qq && apt-get install -qq --no-install-recommends python3-minimal >/dev/null
RUN ln -s /usr/bin/python3 /usr/local/bin/python && mkdir -p /opt/v4forge/scripts
COPY probe.py /opt/v4forge/scripts/
WORKDIR /opt/v4forge
USER 1000
"""


def build(engine: Engine, base: str, folder: Path, **labels: str) -> str:
    """Builds the image with Python and the program, and returns its tag."""
    (folder / "Dockerfile").write_text(DOCKERFILE.format(base=base))
    (folder / "probe.py").write_text(PROBE)
    tag = f"v4forge-test-stage:{labels['lane']}-{labels['code'][:8]}"
    named = {f"io.v4forge.{name}": value for name, value in labels.items()}
    engine.client.images.build(path=str(folder), tag=tag, labels=named, rm=True)
    return tag


@dataclass
class Project:
    """A checkout with one program, a source whose task.py it runs, and the image to run it in."""

    folder: Path
    image: str

    @property
    def work(self) -> Path:
        return self.folder / "scratch/tiny"

    def task(self, code: str) -> None:
        (self.folder / "source/task.py").write_text(textwrap.dedent(code))

    def command(self, *options: str, name: str = "calibrate", source: str = "source") -> list[str]:
        runtime = ["--runtime", "docker", "--source", source, *options]
        return [sys.executable, __file__, "run", name, *runtime]

    def environment(self, **more: str) -> dict[str, str]:
        paths = f"{ROOT}:{ROOT / 'tests/support'}"
        return {**os.environ, "PYTHONPATH": paths, "V4FORGE_IMAGE_CALIB": self.image, **more}

    def run(self, code: str, *options: str, name: str = "calibrate", **more: str) -> subprocess.CompletedProcess[str]:
        """Runs the stage with that task; there may be no warning in what it prints."""
        self.task(code)
        command = self.command(*options, name=name)
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment(**more), capture_output=True, text=True, timeout=120
        )
        assert problems(done.stdout + done.stderr, allowed=[re.compile("^error: ")]) == []
        return done

    def start(self, code: str, **more: str) -> subprocess.Popen[str]:
        """Starts the stage with that task, in a session of its own; returns once the task has printed a line."""
        self.task(code)
        runner = subprocess.Popen(
            self.command(),
            cwd=self.folder,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert runner.stdout
        assert runner.stdout.readline() == "calibrate: the task\n"
        assert runner.stdout.readline() == "alive\n"
        return runner


def left(engine: Engine, folder: Path) -> list[str]:
    """The names of the containers that still are there of runs below `folder`."""
    found = engine.client.containers.list(all=True, filters={"label": RUN_LABEL})
    return [one.name for one in found if one.labels[RUN_LABEL].startswith(f"{folder}/")]


if __name__ == "__main__":
    run_main(lambda: stage.main(sys.argv[1:], TABLE, Path.cwd()))
