"""Quantizes the routed experts of a DeepSeek-V4 checkpoint to INT4, one decoder layer at a time, straight from its
FP4/FP8 bytes. Each finished layer is one file in --work; run the same command again to continue after a stop.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from scripts.cli import parser_for, steps
from v4forge import calibration, corpus, layers
from v4forge.checkpoint import Checkpoint
from v4forge.errors import run_main
from v4forge.layout import upstream


def main() -> None:
    defaults = layers.Settings()
    parser = parser_for("calibrate", __doc__)
    add = parser.add_argument
    add("--source", type=Path, required=True, metavar="DIR", help="upstream shards, index, config.json, tokenizer.json")
    add("--work", type=Path, required=True, metavar="DIR", help="gets a layer-NNN.safetensors and a report a layer")
    add(
        "--corpus",
        type=Path,
        metavar="FILE",
        help='.jsonl of {"messages": […]} or {"text": …}, or .txt (default: the pinned UltraChat split)',
    )
    add("--samples", type=int, default=768, help="calibration samples (default: %(default)s)")
    add("--seq-len", type=int, default=512, help="tokens a sample (default: %(default)s)")
    add("--seed", type=int, default=42, help="picks the samples (default: %(default)s)")
    add(
        "--method",
        choices=("gptq", "rtn"),
        default=defaults.method,
        help="rtn: round-to-nearest, without a corpus, to compare with (default: %(default)s)",
    )
    add(
        "--scales",
        choices=tuple(calibration.SCALES),
        default=defaults.scales,
        help="of GPTQ; absmax is llm-compressor's default rule (default: %(default)s)",
    )
    add(
        "--dampening",
        type=float,
        default=defaults.dampening,
        help="share of the mean of the Hessian's diagonal (default: %(default)s)",
    )
    add(
        "--micro-batch",
        type=int,
        default=defaults.micro_batch,
        help="samples a forward pass; it is part of what fixes the bytes (default: %(default)s)",
    )
    add(
        "--threads",
        type=int,
        default=defaults.threads,
        help="CPU threads; they are part of what fixes the bytes (default: %(default)s)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add(
        "--on-mismatch",
        choices=("refuse", "move"),
        default="refuse",
        help="when --work holds layers of other inputs, settings or code (default: %(default)s)",
    )
    add("--dry-run", action="store_true", help="check source and corpus, say what is to be done, and stop")
    arguments = parser.parse_args()
    for option in ("micro_batch", "threads"):
        if getattr(arguments, option) < 1:
            parser.error(f"argument --{option.replace('_', '-')}: it must be at least 1")
    if not 0 < arguments.dampening < math.inf:
        parser.error("argument --dampening: it must be a positive number")
    try:
        device = torch.device(arguments.device)
    except RuntimeError as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"argument --device: there is no {device} here")

    settings = layers.Settings(
        arguments.method, arguments.scales, arguments.dampening, arguments.micro_batch, arguments.threads
    )
    torch.set_num_threads(settings.threads)
    source = Checkpoint(arguments.source)
    source.validate(upstream(source.config))
    samples = None
    if settings.method == "gptq":
        vocab_size = source.config.vocab_size
        samples = corpus.load(
            arguments.source, arguments.corpus, arguments.samples, arguments.seq_len, arguments.seed, vocab_size
        )
    cache = arguments.work.parent / ".stamps" / "digests.json"
    digests = layers.source_digests(arguments.source, source.shard_names, cache)
    mark = layers.fingerprint(digests, samples, settings, device)
    todo = source.config.layers
    done = [i for i in todo if layers.finished(arguments.work, i, layers.digest_of(mark))]
    print(f"{len(todo)} layers, {len(done)} finished; {samples.description if samples else 'no corpus'}; {device}")
    if arguments.dry_run:
        return
    layers.claim(arguments.work, mark, arguments.on_mismatch, print)
    with steps("calibrate", len(todo)) as advance:
        calibration.calibrate(source, samples, arguments.work, settings, mark, device, advance)


if __name__ == "__main__":
    run_main(main)
