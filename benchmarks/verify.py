"""Measures verify at DeepSeek-V4-Flash's full dimensions: how fast it reads against `cat`, and a layer of --deep.

    python -m benchmarks.verify --work /scratch/bench --out benchmarks/results/verify-h200

Makes a source of a few layers with MTP block, embedding and head, and its artifact, with the project's own programs
(45 GB, kept in --work). Then `cat` of all their files and the full check without hashing take turns, each with nothing
in the page cache, then the check with hashing, on the CPU and on --device: seconds, and of all threads together what
each part of the work took. --no-deep ends there. --out gets a .json. --small is the same on a CPU in a minute; its
figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import torch

from benchmarks import flash_layers
from benchmarks.machine import machine
from benchmarks.timeline import busy
from scripts.cli import parser_for
from v4forge import digests
from v4forge.checkout import ROOT
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import run_main
from v4forge.files import write_json
from v4forge.model import evaluation
from v4forge.pipeline import requirements
from v4forge.pipeline.disk_speed import forget
from v4forge.profiling import Watch
from v4forge.units import GB, GIB
from v4forge.verification import certificate, reference, scan

TINY = ROOT / "models" / "tiny"


def made(work: Path, layers: int, small: bool, device: str) -> tuple[Path, Path]:
    """The source and the artifact in `work`, round-to-nearest; made by programs, so that none of it stays in memory."""
    upstream, artifact = work / "upstream", work / "artifact"
    if not (artifact / "SHA256SUMS").is_file():
        program(
            "benchmarks.flash_layers", "--out", upstream, "--layers", layers, "--device", device, *["--small"] * small
        )
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(TINY / name, upstream / name)
        folders = ("--source", upstream, "--work", work / "layers")
        program("scripts.calibrate", *folders, "--method", "rtn", "--device", device)
        program("scripts.postprocess", *folders, "--out", artifact)
    return upstream, artifact


def program(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def cold(files: Sequence[Path], work: Callable[[], Any]) -> float:
    """Seconds of `work` when nothing of `files` is in the page cache."""
    for path in files:
        forget(path)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# what is called -> the name of its part of the work
PARTS = {
    "read": (scan, "read_into"),
    "compare": (reference, "all_compared"),
    "expect": (reference, "expected"),
    "bits": (reference, "same_bits"),
    "digest": (scan, "matrix_digest"),
    "hash": (digests, "file_sha256"),
}


@contextmanager
def parts_timed() -> Iterator[dict[str, float]]:
    """Seconds of all threads by part of the work; waiting for other threads and for a GPU is in them."""
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    lock = threading.Lock()

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                with lock:
                    spent[what] += time.perf_counter() - start

        return run

    with ExitStack() as held:
        for what, (module, name) in PARTS.items():
            held.enter_context(mock.patch.object(module, name, timed(what, getattr(module, name))))
        yield spent


def reading(upstream: Path, artifact: Path, rounds: int, device: torch.device) -> dict[str, Any]:
    """`cat` and verify in turns over the shards of both folders, then verify with hashing, by device."""
    files = sorted([*upstream.glob("*.safetensors"), *artifact.glob("*.safetensors")])
    size = sum(path.stat().st_size for path in files)

    def cat() -> None:
        subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)

    def check(hashing: bool, where: torch.device) -> None:
        known = digests.Digests(artifact / ".no-cache.json")
        checks, not_run, _ = certificate.verify(
            artifact, Checkpoint(upstream), known, expect="rtn", hashing=hashing, device=where
        )
        assert all(each.ok for each in checks), [each for each in checks if not each.ok]
        assert ("recorded" in not_run) != hashing

    seconds: dict[str, list[float]] = {"cat": [], "verify": []}
    for _ in range(rounds):
        seconds["cat"].append(cold(files, cat))
        seconds["verify"].append(cold(files, lambda: check(False, device)))
    hashing = {}
    for where in dict.fromkeys((torch.device("cpu"), device)):
        with parts_timed() as spent:
            taken = cold(files, partial(check, True, where))
        hashing[where.type] = {"seconds": taken, "GB/s": size / taken / GB, "threads": scan.THREADS, "parts": spent}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "bytes": size,
        "seconds": seconds,
        "cat GB/s": size / median(seconds["cat"]) / GB,
        "verify GB/s": size / median(seconds["verify"]) / GB,
        "ratio": median(c / v for c, v in zip(seconds["cat"], seconds["verify"], strict=True)),
        "peak_host_gib": peak / GIB,
        "with hashing": hashing,
        "with hashing, seconds": hashing[device.type]["seconds"],
    }


def predicting(upstream: Path, artifact: Path, sequences: int, device: torch.device) -> dict[str, Any]:
    """--deep over random tokens: seconds by layer, both models, and what the 43 layers and the rest would take.

    A layer's time is that from its beginning to the next one's, waiting for the disk included.
    """
    models = [Checkpoint(upstream), Checkpoint(artifact, form="artifact")]
    config = models[0].config
    tokens = flash_layers.zipf_tokens(sequences, 512, config.vocab_size, 0)
    for each in models:
        for shard in each.shard_names:
            forget(each.directory / shard)
    begun: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch = Watch(device)

    def note(_number: int, what: str) -> None:
        begun.setdefault(what, watch.now())

    evaluation.compare(models, tokens, device, note, watch)
    times = [*begun.values(), watch.now()]
    taken = {what: after - at for (what, at), after in zip(begun.items(), times[1:], strict=True)}
    spans = [span for span in watch.spans() if span.lane == "compute"]
    count = len(config.layers)
    computed = {i: busy([span for span in spans if span.layer == i]) for i in (*config.layers, count)}
    steady = list(taken.values())[1:count] or list(taken.values())[:1]  # behind the first, which loads libraries
    rest = times[0] + sum(list(taken.values())[count:])
    flash = requirements.flash_config().num_hidden_layers
    first = next(iter(taken.values()))
    return {
        "tokens": tokens.numel(),
        "seconds": {"before": times[0], **taken},
        "compute_s_by_layer": computed,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0,
        "peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "projected_s": first + (flash - 1) * mean(steady) + rest,
        "arithmetic": f"{first:.1f} + {flash - 1} x {mean(steady):.2f} + {rest:.1f} s: embedding, head, MTP block",
    }


def main() -> None:
    parser = parser_for("verify", __doc__)
    parser.prog = "python -m benchmarks.verify"
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="scratch: 45 GB for 2 layers")
    add("--out", type=Path, required=True, metavar="FILE", help="gets FILE.json")
    add("--layers", type=int, default=2, help="decoder layers (default: %(default)s)")
    add("--rounds", type=int, default=3, help="turns of cat and verify (default: %(default)s)")
    add("--sequences", type=int, default=16, help="of 512 tokens, for --deep (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--no-deep", action="store_true", help="leave out the models' predictions")
    add("--small", action="store_true", help="small dimensions, to try the program out")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    upstream, artifact = made(args.work, args.layers, args.small, args.device)
    found: dict[str, Any] = {"command": f"python -m benchmarks.verify --layers {args.layers} --rounds {args.rounds}"}
    found |= machine(torch.device(args.device))
    device = torch.device(args.device)
    found["reading"] = reading(upstream, artifact, args.rounds, device)  # first: a process' peak memory never falls
    if not args.no_deep:
        found["deep"] = predicting(upstream, artifact, args.sequences, device)
    write_json(args.out.with_name(args.out.name + ".json"), found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    run_main(main)
