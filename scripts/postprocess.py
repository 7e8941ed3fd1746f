"""Makes the artifact from finished layer files and the source: W4A16 experts, FP8 attention, BF16 MTP block.

The layers are those of calibrate (--work), hard-linked and not copied. Or a folder that llm-compressor saved is
repaired (--from-hf): its routed experts' INT4 codes and scales are kept as they are; names, config.json, FP8 attention,
F32 parameters, the MTP block and its aliases come from the source. The result holds shards, index, config.json,
tokenizer, manifest.json and SHA256SUMS; python -m scripts.verify checks it. Run the same command again after a stop.
"""

from __future__ import annotations

from pathlib import Path

from v4forge.errors import run_main
from v4forge.units import GB

from .cli import parser_for, steps


def main() -> None:
    parser = parser_for("postprocess", __doc__)
    parser.add_argument("--source", type=Path, required=True, metavar="DIR", help="the upstream checkpoint")
    experts = parser.add_mutually_exclusive_group(required=True)
    experts.add_argument("--work", type=Path, metavar="DIR", help="layer files of calibrate")
    experts.add_argument(
        "--from-hf",
        type=Path,
        metavar="DIR",
        help="a folder of llm-compressor's oneshot and save_pretrained: symmetric INT4 in groups of 128, in"
        " transformers' names or hybrid ones; python -m scripts.verify --artifact DIR lists what is wrong with it",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the artifact's folder")
    arguments = parser.parse_args()

    from v4forge.checkpoint.reader import Checkpoint
    from v4forge.quantization.postprocess import assemble

    source = Checkpoint(arguments.source)
    with steps("postprocess", source.config.num_hidden_layers + 2, "shards") as advance:
        if arguments.work:
            assemble(source, arguments.work, arguments.out, advance)
        else:
            from v4forge.quantization.from_hf import repair  # with compressed-tensors, which only this needs

            repair(source, arguments.from_hf, arguments.out, advance)
    size = sum(path.stat().st_size for path in arguments.out.glob("*.safetensors"))
    print(f"{arguments.out}: {size / GB:.3f} GB")


if __name__ == "__main__":
    run_main(main)
