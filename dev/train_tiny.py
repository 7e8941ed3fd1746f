"""Trains the embedded model of models/tiny and writes it in the upstream FP4/FP8 form, with its figures.

On one H200 the defaults take a few minutes. `python -m dev.make_tiny_text` makes the training text and the tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
from pathlib import Path

from dev.tiny.settings import Settings
from scripts.cli import DEVICE, parser_for, some_device
from v4forge.errors import UserError, run_main
from v4forge.files import write_json


def main() -> None:
    parser = parser_for("train_tiny", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models/tiny"),
        metavar="DIR",
        help="holds the tokenizer and heldout.txt; gets the shards (default: %(default)s)",
    )
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="training text of dev.make_tiny_text --train-out"
    )
    parser.add_argument("--device", help=DEVICE)
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            help="default: %(default)s",
        )
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        raise UserError(
            f"{arguments.text} does not exist", f"python -m dev.make_tiny_text --train-out {arguments.text}"
        )
    settings = Settings(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings)})

    import torch

    from dev.tiny import text as tiny_text
    from dev.tiny import train
    from v4forge.checkpoint.reader import Checkpoint
    from v4forge.model.evaluation import evaluate, unigram_perplexity

    device = torch.device(arguments.device or some_device())
    text = torch.from_numpy(tiny_text.train_tokens(arguments.out, arguments.text).astype("int64"))
    heldout = torch.from_numpy(tiny_text.heldout_tokens(arguments.out, arguments.out / "heldout.txt").astype("int64"))
    heldout = heldout[: len(heldout) // settings.seq_len * settings.seq_len].view(-1, settings.seq_len)
    started = time.monotonic()

    def progress(step: int, main: float, draft: float) -> None:
        elapsed = time.monotonic() - started
        eta = elapsed / (step + 1) * (settings.steps - step - 1)
        print(
            f"step {step:5}/{settings.steps}  loss {main:.4f}  draft {draft:.4f}  {elapsed:5.0f} s, {eta:4.0f} s left",
            flush=True,
        )

    tiny, config = train.train(text, settings, device, progress)
    train_s = time.monotonic() - started
    train.export(tiny, config, arguments.out)
    quality = evaluate(Checkpoint(arguments.out), heldout, device)
    figures = {
        "tokens": quality.tokens,
        "perplexity": quality.perplexity,
        "mtp_acceptance": quality.mtp_acceptance,
        "unigram_perplexity": unigram_perplexity(heldout),
        "train_tokens": len(text),
        "train_s": round(train_s, 1),
        "settings": dataclasses.asdict(settings),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "command": "python -m dev.train_tiny " + " ".join(sys.argv[1:]),
    }
    write_json(arguments.out / "training.json", figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_main(main)
