"""Measures calibration at DeepSeek-V4-Flash's full dimensions on several GPUs: a few layers on 1, 2, 4, … ranks.

    python -m benchmarks.ranks --work /dev/shm/bench --out benchmarks/results/ranks-h100 --ranks 1 2 4 --killed

Writes upstream bytes of 3 layers first (kept in --work), then runs the real loop under torchrun on each number of ranks
over 768 x 512 tokens, and compares: seconds a layer and where they go, codes, losses. --killed kills a rank of the
largest run in its second layer and resumes it: its files must have the same bytes. What was measured is kept in --work
and not measured again. --out gets a .json. Exit code 1 when something is not within what is stated.

A folder in memory shows what the GPUs do; on a disk slower than they are, the disk is what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import flash_layers
from benchmarks.machine import machine
from benchmarks.ranks_figures import against, same_bytes, table, told
from scripts.cli import parser_for
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError, run_main
from v4forge.files import make_folder, write_json
from v4forge.model import distributed
from v4forge.model.corpus import Corpus
from v4forge.profiling import Watch
from v4forge.quantization import calibrate, layer_files
from v4forge.units import GIB
from v4forge.verification.tolerances import REPLAY_EQUAL_CODES, REPLAY_LOSS_OFF

MARK = {"benchmark": "ranks"}
POLL_S = 0.05


@dataclass(frozen=True)
class TimedRanks(distributed.Ranks):
    """Ranks whose exchanges of rows leave their seconds, waiting for the others included, in `spent`."""

    gpu: bool = False
    spent: list[tuple[Any, Any]] = field(default_factory=list)

    def exchange(self, rows: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        start = self.event()
        received = super().exchange(rows, counts)
        self.spent.append((start, self.event()))
        return received

    def event(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def exchange_s(self) -> float:
        """Seconds of all exchanges so far. Waits for the GPU."""
        if self.gpu:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in self.spent) / 1e3
        return sum(end - start for start, end in self.spent)


def worker(args: argparse.Namespace) -> None:
    """One rank of a run, started by torchrun; rank 0 writes what all of them measured."""
    torch.set_num_threads(layer_files.Settings().threads)
    with distributed.joined(torch.device(args.device)) as (joined, device):
        source = Checkpoint(args.work / "upstream")
        tokens = flash_layers.zipf_tokens(args.samples, args.seq_len, source.config.vocab_size, 0)
        corpus = Corpus(tokens, "sha256", 0, "Zipf-distributed tokens")
        if joined.rank == 0:
            layer_files.claim(args.into, MARK, "refuse", print)
        joined.barrier()
        watch = Watch(device)
        place = TimedRanks(joined.rank, joined.size, device.type == "cuda")
        start = watch.now()
        calibrate.calibrate(
            source, corpus, args.into, layer_files.Settings(), MARK, device, place, log=print, watch=watch
        )
        own = {
            "wall_s": watch.now() - start,
            "exchange_s": place.exchange_s(),
            "spans": [asdict(span) for span in watch.spans()],
            "peak_gpu_gib": torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0,
        }
        everyones = joined.gather(own)
        if joined.rank == 0:
            write_json(args.into / "measured.json", {"ranks": everyones})


def launched(args: argparse.Namespace, size: int, into: Path) -> subprocess.Popen[bytes]:
    """A run of `size` ranks into a folder."""
    words: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    words += ["-m", "benchmarks.ranks", "--work", args.work, "--out", args.out, "--into", into]
    words += ["--samples", args.samples, "--seq-len", args.seq_len, "--device", args.device]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.Popen(list(map(str, words)), env=environment, start_new_session=True)


def whole(args: argparse.Namespace, size: int, into: Path) -> None:
    """A run to its end. Raises UserError when it fails."""
    if code := launched(args, size, into).wait():
        raise UserError(f"the run of {size} ranks ended with code {code}", "see its output above")


def killed(args: argparse.Namespace, size: int, into: Path) -> dict[str, Any]:
    """A run whose last rank is killed once a layer is finished, and the run after it, which ends what it began."""
    shutil.rmtree(into, ignore_errors=True)
    run = launched(args, size, into)
    first = layer_files.layer_file(into, 0)
    wait_for(first.exists, run)
    victim = process_of(run.pid, size - 1)
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    code = run.wait()
    ended_s = time.monotonic() - begun
    done = sorted(path.name for path in into.glob("layer-*.safetensors"))
    begun = time.monotonic()
    whole(args, size, into)
    return {
        "ranks": size,
        "killed_rank": size - 1,
        "exit_code": code,
        "others_ended_after_s": ended_s,
        "layers_finished_before": done,
        "resumed_in_s": time.monotonic() - begun,
    }


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    while not condition():
        if run.poll() is not None:
            raise UserError(
                f"the run ended with code {run.returncode} before a rank was killed", "see its output above"
            )
        time.sleep(POLL_S)


def process_of(launcher: int, rank: int) -> int:
    """The process of a rank that the torchrun `launcher` has started."""
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except (OSError, ValueError, IndexError):
            continue
        if f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise UserError(f"rank {rank} was not found among the processes", "run it again")


def arguments() -> argparse.Namespace:
    parser = parser_for("ranks", __doc__)
    parser.prog = "python -m benchmarks.ranks"
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="20 GB of source, 10 GB a number of ranks")
    add("--out", type=Path, required=True, metavar="FILE", help="gets FILE.json")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="default: 1 2 4")
    add("--killed", action="store_true", help="kill a rank of the largest run, and resume")
    add("--layers", type=int, default=3, help="decoder layers (default: %(default)s)")
    add("--samples", type=int, default=768, help="default: %(default)s")
    add("--seq-len", type=int, default=512, help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--small", action="store_true", help="small dimensions, to try the program out")
    add("--into", type=Path, metavar="DIR", help=argparse.SUPPRESS)  # of a rank
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.into:
        worker(args)
        return 0
    device = torch.device(args.device)
    upstream = args.work / "upstream"
    make_folder(args.work)
    if not (upstream / "config.json").is_file():
        flash_layers.write_checkpoint(upstream, flash_layers.config_dict(args.layers, args.small), 0, device, print)
    folders = {size: args.work / f"ranks-{size}" for size in args.ranks}
    rows: dict[int, dict[str, Any]] = {}
    for size, folder in folders.items():
        if not (folder / "measured.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            whole(args, size, folder)
        rows[size] = told(json.loads((folder / "measured.json").read_text()))
        print(f"{size} ranks:", json.dumps(rows[size]), flush=True)
    base, largest = folders[min(folders)], max(folders)
    for size, folder in folders.items():
        if folder != base:
            rows[size]["against"] = against(base, folder, device)
    found: dict[str, Any] = {
        "command": f"python -m benchmarks.ranks --ranks {' '.join(map(str, args.ranks))}{' --killed' * args.killed}",
        **machine(device),
        "tokens": [args.samples, args.seq_len],
        "layers": args.layers,
        "stated": {"least_equal_codes": REPLAY_EQUAL_CODES, "most_loss_off": REPLAY_LOSS_OFF},
        "ranks": rows,
    }
    ok = all(row["against"]["within"] for row in rows.values() if "against" in row)
    if args.killed:
        again = args.work / f"ranks-{largest}-killed"
        found["killed"] = killed(args, largest, again)
        found["killed"]["same_bytes"] = same_bytes(folders[largest], again)
        print("killed:", json.dumps(found["killed"]), flush=True)
        ok = ok and found["killed"]["same_bytes"] and found["killed"]["exit_code"] != 0
    write_json(args.out.with_name(args.out.name + ".json"), found)
    Console(width=110).print(table(rows))
    print("all within what is stated" if ok else "NOT within what is stated")
    return 0 if ok else 1


if __name__ == "__main__":
    run_main(main)
