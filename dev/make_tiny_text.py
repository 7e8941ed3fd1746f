"""Makes the tokenizer and the texts of the embedded model from the running Python's standard library.

Needed only to make models/tiny anew: what it writes there is committed. The same Python release writes the same
files, and models/tiny/TEXTS.md names the release that wrote those. The training text, about 11 MB, goes where you say
and is not committed; train_tiny reads its tokens.

    python -m dev.make_tiny_text --out models/tiny --train-out scratch/train.txt --tokens-out scratch
"""

from __future__ import annotations

from pathlib import Path

from dev.tiny import text
from scripts.cli import parser_for
from v4forge.errors import run_main


def main() -> None:
    parser = parser_for("tiny_text", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models/tiny"),
        metavar="DIR",
        help="folder of the embedded model: gets the tokenizer and the committed texts (default: %(default)s)",
    )
    parser.add_argument(
        "--train-out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the training text: UTF-8, each document between BOS and EOS",
    )
    parser.add_argument(
        "--tokens-out",
        type=Path,
        metavar="DIR",
        help="also write train.npy and heldout.npy, token ids as uint16, into this folder",
    )
    arguments = parser.parse_args()
    for name, size in text.build(arguments.out, arguments.train_out, arguments.tokens_out).items():
        print(f"{name.replace('_', ' '):<24} {size:>12,}")


if __name__ == "__main__":
    run_main(main)
