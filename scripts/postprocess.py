"""Makes the artifact from finished layer files and the source: W4A16 experts, FP8 attention, BF16 MTP block.

Layer files are hard-linked, not copied. The result holds shards, index, config.json, tokenizer, manifest.json and
SHA256SUMS; python -m scripts.verify checks it. Run the same command again after a stop.
"""

from __future__ import annotations

from pathlib import Path

from scripts.cli import parser_for, steps
from v4forge.artifact import assemble
from v4forge.checkpoint import Checkpoint
from v4forge.errors import run_main


def main() -> None:
    parser = parser_for("postprocess", __doc__)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the upstream checkpoint")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="layer files of scripts.calibrate")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the artifact's folder")
    arguments = parser.parse_args()
    source = Checkpoint(arguments.source)
    with steps("postprocess", source.config.num_hidden_layers + 2) as advance:
        assemble(source, arguments.work, arguments.out, advance)
    size = sum(path.stat().st_size for path in arguments.out.glob("*.safetensors"))
    print(f"{arguments.out}: {size / 1e9:.3f} GB")


if __name__ == "__main__":
    run_main(main)
