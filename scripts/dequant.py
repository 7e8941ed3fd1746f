"""Decodes a DeepSeek-V4 checkpoint from FP4 and FP8 to BF16, exactly, with the Multi-Token Prediction block kept.

For other tools; the pipeline itself does not need it. Run the same command again to continue after a stop.
"""

from __future__ import annotations

from pathlib import Path

from v4forge.checkpoint.layout import upstream
from v4forge.digests import cache_of, digest_of
from v4forge.errors import run_main
from v4forge.quantization.layer_files import source_digests

from .cli import parser_for, steps


def main() -> None:
    parser = parser_for("dequant", __doc__)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="upstream checkpoint")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="gets the BF16 files, 3.6 times the size"
    )
    arguments = parser.parse_args()

    from v4forge.checkpoint.reader import Checkpoint
    from v4forge.quantization.dequant import dequantize

    source = Checkpoint(arguments.source)
    source.validate(upstream(source.config))  # before every byte is read for the digests
    cache = cache_of(arguments.out.parent)
    mark = digest_of(source_digests(arguments.source, source.shard_names, cache))
    with steps("dequant", source.config.num_hidden_layers + 2, "shards", resumes=True) as advance:
        dequantize(source, arguments.out, mark, advance)
    print(f"{arguments.out}: BF16 with the MTP block, {len(source.config.layers)} layers")


if __name__ == "__main__":
    run_main(main)
