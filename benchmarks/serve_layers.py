"""Makes an artifact of DeepSeek-V4-Flash's dimensions, a few decoder layers deep, that a server can be tried on.

    python -m benchmarks.serve_layers --work /scratch/bench --layers 3

A random source (benchmarks.flash_layers), predictable or not, through round-to-nearest and postprocess, with the
embedded model's tokenizer: `upstream` and `artifact` in --work, 47 GB for 3 layers.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.verify import TINY, program
from scripts.cli import parser_for
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import run_main
from v4forge.files import write_json


def widened(tokenizer: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The content of a tokenizer.json with a name for each of `size` ids: a server looks up all that it may write."""
    model = tokenizer["model"]
    taken = {*model["vocab"].values(), *(each["id"] for each in tokenizer["added_tokens"])}
    more = {f"<unused {number}>": number for number in range(size) if number not in taken}
    return {**tokenizer, "model": {**model, "vocab": model["vocab"] | more}}


def named(upstream: Path) -> None:
    """Gives a random checkpoint the embedded model's tokenizer, widened."""
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TINY / name, upstream / name)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(upstream / "tokenizer.json", widened(tokenizer, Checkpoint(upstream).config.vocab_size))


def make(work: Path, layers: int, device: str, small: bool, predictable: bool = False) -> Path:
    """The artifact, made unless it is there."""
    upstream, artifact = work / "upstream", work / "artifact"
    if (artifact / "SHA256SUMS").is_file():
        return artifact
    source = ("--out", upstream, "--layers", layers, "--device", device, *["--small"] * small)
    source += ("--predictable",) * predictable
    program("benchmarks.flash_layers", *source)
    named(upstream)
    folders = ("--source", upstream, "--work", work / "layers")
    program("scripts.calibrate", *folders, "--method", "rtn", "--device", device)
    program("scripts.postprocess", *folders, "--out", artifact)
    return artifact


def main() -> None:
    parser = parser_for("serve_layers", __doc__)
    parser.prog = "python -m benchmarks.serve_layers"
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="gets upstream, layers and artifact")
    add("--layers", type=int, default=3, metavar="N", help="decoder layers (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--small", action="store_true", help="small dimensions, to try the program out")
    add("--predictable", action="store_true", help="drafts are accepted, and most tokens are no near ties")
    args = parser.parse_args()
    begun = time.monotonic()
    artifact = make(args.work, args.layers, args.device, args.small, args.predictable)
    print(f"{artifact}: {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    run_main(main)
