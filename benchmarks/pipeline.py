"""Times the stages of `make demo`, which is what `make plan PROFILE=tiny` estimates with.

    python -m benchmarks.pipeline --out benchmarks/results/pipeline-tiny.json

Each round runs all stages in a folder of its own; the times are those of its reports/run.json, the memory that of its
events.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from scripts.cli import parser_for, steps
from v4forge import machine
from v4forge.errors import UserError, run_main
from v4forge.files import read_json, write_json
from v4forge.pipeline import estimate, events
from v4forge.pipeline.stages import PROFILES

TINY = PROFILES["tiny"]


def round_of(scratch: Path) -> tuple[dict[str, float], dict[str, int]]:
    """One run of everything -> stage -> seconds, and bytes of the host's memory at most."""
    command = [sys.executable, "-m", "scripts.stage", "run", *estimate.names_of("tiny")]
    command += ["--profile", "tiny", "--scratch", str(scratch)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError("a stage failed, see above", "make demo")
    memory: dict[str, int] = defaultdict(int)
    for event in events.read(events.file_of(scratch / "tiny")):
        memory[event["stage"]] = max(memory[event["stage"]], event.get("peak_host_bytes") or 0)
    entries = read_json(scratch / "tiny" / "reports" / "run.json")
    return {name: entry["elapsed_s"] for name, entry in entries.items()}, memory


def main() -> None:
    parser = parser_for("pipeline", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets the figures as JSON")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds is at least 1")
    seconds: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, int] = defaultdict(int)
    load = os.getloadavg()[0]
    with steps("pipeline", arguments.rounds, "rounds") as progress:
        for number in range(arguments.rounds):
            progress(number, "")
            with tempfile.TemporaryDirectory() as scratch:
                took, held = round_of(Path(scratch))
            for name, each in took.items():
                seconds[name].append(each)
                memory[name] = max(memory[name], held.get(name, 0))
    stages: dict[str, dict[str, Any]] = {
        name: {"median_s": round(median(each), 2), "seconds": each, "peak_host_bytes": memory[name] or None}
        for name, each in seconds.items()
    }
    write_json(
        arguments.out,
        {
            "command": "python -m benchmarks.pipeline",
            "machine": machine.facts(),
            "load_before": load,  # processes that wanted a core: the times hold on a machine that is idle otherwise
            "samples": TINY.samples,
            "seq_len": TINY.seq_len,
            "runs": arguments.rounds,
            "stages": stages,
        },
    )


if __name__ == "__main__":
    run_main(main)
