"""The artifact beside upstream's own checkpoint, made and served on this machine, at as many layers as fit.

    python -m benchmarks.full_depth --work /scratch/full --gpus 0 1 --out benchmarks/results/full-depth.json
    python -m benchmarks.full_depth --work /dev/shm/ten --layers 10 --together --out benchmarks/results/depth-10.json

Stages, in this order: `source` writes a predictable random checkpoint of DeepSeek-V4-Flash's dimensions; `calibrate`,
`postprocess` and `verify` are the programs of `make artifact`, on the standard library's sources; `serve` starts vLLM
on the artifact and on upstream's own checkpoint with the same settings, once for each k of --drafts and each of
--backends at k = 0, and streams the same prompts from both. --together has both on the GPUs at the same time and takes
turns between them, so that a ratio is of the same seconds; else one is measured after the other.

Which drafts are accepted says nothing on random weights: vLLM draws it (synthetic rejection) at the rates that a
public run of the published artifact reports; a step's time does not depend on it, and the time per output token of
texts with other rates follows from the step's. What --out already holds is not done again: after a stop, or with more
--drafts, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.full_depth_serving import measured, table
from benchmarks.machine import machine
from benchmarks.serve_layers import named
from scripts.cli import parser_for
from v4forge.errors import UserError, run_main
from v4forge.files import make_folder, read_json, write_json, write_text
from v4forge.units import GB

CORPUS_BYTES = 6_000_000
STAGES = ("source", "calibrate", "postprocess", "verify", "serve")
Row = dict[str, Any]


def corpus(work: Path) -> Path:
    """Text that every machine has: the standard library's sources."""
    path = work / "corpus.txt"
    if not path.is_file():
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = "\n\n".join(each.read_text(encoding="utf-8", errors="replace") for each in sources)
        write_text(path, text[:CORPUS_BYTES])
    return path


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """What each stage before `serve` runs, a word a part."""
    work: Path = args.work
    python = [sys.executable, "-m"]
    ranks = [*python, "torch.distributed.run", "--nproc-per-node", str(len(args.gpus)), "-m"]
    folders = ["--source", str(work / "upstream"), "--work", str(work / "layers")]
    size = ["--samples", str(args.samples), "--seq-len", str(args.seq_len), "--keep-every", "0"]
    checked = ["--source", str(work / "upstream"), "--artifact", str(work / "artifact"), "--expect", "gptq"]
    source = ["--out", str(work / "upstream"), "--layers", str(args.layers), "--device", args.device, "--predictable"]
    return {
        "source": [*python, "benchmarks.flash_layers", *source, *["--small"] * args.small],
        "calibrate": [
            *(ranks if len(args.gpus) > 1 else python),
            "scripts.calibrate",
            *folders,
            *["--corpus", str(corpus(work)), "--device", args.device, *size],
        ],
        "postprocess": [*python, "scripts.postprocess", *folders, "--out", str(work / "artifact")],
        "verify": [*python, "scripts.verify", *checked],
    }


def size_of(folder: Path) -> int:
    return sum(each.stat().st_size for each in folder.glob("*.safetensors"))


def staged(name: str, command: list[str], args: argparse.Namespace) -> Row:
    """Runs a stage. Raises UserError where it ends with another code than 0."""
    begun = time.monotonic()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, args.gpus))}
    ended = subprocess.run(command, check=False, env=environment)
    if ended.returncode:
        raise UserError(f"{name} ended with code {ended.returncode}", shlex.join(command))
    if name == "source":
        named(args.work / "upstream")
    written = {"source": "upstream", "calibrate": "layers", "postprocess": "artifact"}.get(name)
    seconds = time.monotonic() - begun
    return {"s": seconds, **({"bytes": size_of(args.work / written)} if written else {})}


def arguments() -> argparse.Namespace:
    parser = parser_for("full_depth", __doc__)
    parser.prog = "python -m benchmarks.full_depth"
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="in memory where it fits; 330 GB at 43 layers")
    add("--out", type=Path, required=True, metavar="FILE.json", help="gets every figure as soon as it is known")
    add("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="(default: all)")
    add("--layers", type=int, default=43, metavar="N", help="decoder layers (default: %(default)s)")
    add("--gpus", type=int, nargs="+", default=[0], metavar="N", help="ranks, and one replica's (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--samples", type=int, default=768, help="default: %(default)s")
    add("--seq-len", type=int, default=512, help="default: %(default)s")
    add("--small", action="store_true", help="small dimensions, to try the program out")
    add("--drafts", type=int, nargs="*", default=[0, 1, 2, 3], metavar="K", help="default: 0 1 2 3")
    add(
        "--backends", nargs="*", default=["", "marlin"], help="of experts at k = 0, '' is vLLM's choice (default: both)"
    )
    add("--together", action="store_true", help="both servers at the same time")
    add("--backend", default="cuda", help="of settings.toml (default: %(default)s)")
    add("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="other values of settings")
    add("--vllm", default="vllm", metavar="COMMAND", help="what starts vLLM (default: %(default)s)")
    add("--cache", type=Path, default=Path("scratch/serve-cache"), metavar="DIR", help="what vLLM compiles")
    add("--limit", type=float, default=900, metavar="S", help="for a start, in seconds (default: %(default)s)")
    add("--prompt-tokens", type=int, default=256, help="default: %(default)s")
    add("--tokens", type=int, default=256, help="of an answer (default: %(default)s)")
    add("--streams", type=int, default=12, help="prompts streamed one at a time (default: %(default)s)")
    add("--concurrency", type=int, nargs="*", default=[1, 4, 16, 64], metavar="N", help="default: 1 4 16 64")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    args.work, args.cache = args.work.absolute(), args.cache.absolute()
    make_folder(args.work)
    about = {"layers": args.layers, "gpus": len(args.gpus), "small": args.small}
    found = read_json(args.out) or {**about, **machine(torch.device(args.device)), "commands": [], "stages": {}}
    if {name: found.get(name) for name in about} != about:
        raise UserError(f"{args.out} holds figures of another run", "--out names another file")
    found["commands"].append(shlex.join(["python", "-m", "benchmarks.full_depth", *sys.argv[1:]]))
    save = partial(write_json, args.out, found)
    for name, command in commands(args).items():
        if name in args.stages and name not in found["stages"]:
            found["stages"][name] = staged(name, command, args)
            save()
            row = found["stages"][name]
            print(f"{name}: {row['s']:.0f} s, {row.get('bytes', 0) / GB:.1f} GB", flush=True)
    if "serve" in args.stages:
        measured(args, found.setdefault("servers", []), save)
        Console(width=140).print(table(found["servers"]))
    return 1 if any(row.get("failure") for row in found.get("servers", ())) else 0


if __name__ == "__main__":
    run_main(main)
