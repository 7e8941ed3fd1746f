"""Measures the source and two artifacts on the same held-out tokens: KL divergence from the source, agreement on the
most likely token, perplexity and greedy MTP drafts, with 95% intervals, as `verify --deep` does for one artifact.

    python -m scripts.evaluate --source models/tiny --heldout models/tiny/heldout.txt \\
        --artifact scratch/tiny/artifact --baseline scratch/tiny/artifact-rtn --out scratch/tiny/reports/evaluation.json
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.cli import DEVICE, parser_for, some_device, steps
from v4forge.artifact_folder import sums_sha256
from v4forge.errors import UserError, run_main
from v4forge.files import write_json
from v4forge.model.corpus_rows import BAD_TEXT
from v4forge.model.heldout import tokens as heldout_tokens

if TYPE_CHECKING:
    import torch

    from v4forge.checkpoint.reader import Checkpoint


def open_checkpoint(directory: Path, form: str, what: str, hint: str) -> Checkpoint:
    if not directory.is_dir():
        raise UserError(f"the {what} {directory} does not exist", hint)
    from v4forge.checkpoint.reader import Checkpoint

    return Checkpoint(directory, form=form)


def measure(
    models: dict[str, Checkpoint], tokens: torch.Tensor, device: torch.device, progress: Callable[[int, str], None]
) -> dict[str, Any]:
    """The figures of each model, the first of which is the source, and the bytes of its shards."""
    from v4forge.model.evaluation import compare, figures

    found = figures(compare(list(models.values()), tokens, device, progress, count=1), list(models))
    for name, checkpoint in models.items():
        found["models"][name]["bytes"] = sum(
            (checkpoint.directory / shard).stat().st_size for shard in checkpoint.shard_names
        )
    return found


def main() -> None:
    parser = parser_for("evaluate", __doc__)
    for name, text in {
        "--source": "the upstream checkpoint; its tokenizer encodes the text",
        "--artifact": "the GPTQ artifact, of postprocess",
        "--baseline": "the round-to-nearest artifact, to compare with",
    }.items():
        parser.add_argument(name, type=Path, required=True, metavar="DIR", help=text)
    parser.add_argument(
        "--heldout", type=Path, required=True, metavar="FILE", help="text that nothing was fitted to, .txt or .jsonl"
    )
    parser.add_argument(
        "--bad-text", choices=BAD_TEXT, default=BAD_TEXT[0], help="as calibrate's (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets the figures as JSON")
    parser.add_argument("--sequences", type=int, default=32, help="how many sequences (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a sequence (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads: the last digits depend on it (default: %(default)s)"
    )
    parser.add_argument("--device", help=DEVICE)
    args = parser.parse_args()
    if args.sequences < 1 or args.seq_len < 3 or args.threads < 1:
        parser.error("--sequences and --threads are at least 1, --seq-len at least 3: a draft is two tokens ahead")

    import torch

    from v4forge.model.evaluation import step_count, unigram_perplexity

    torch.set_num_threads(args.threads)
    models = {
        "source": open_checkpoint(args.source, "source", "source", "make fetch PROFILE=flash, or --source models/tiny"),
        "rtn": open_checkpoint(args.baseline, "artifact", "round-to-nearest artifact", "make demo"),
        "gptq": open_checkpoint(args.artifact, "artifact", "artifact", "make artifact"),
    }
    vocab_size = models["source"].config.vocab_size
    tokens = heldout_tokens(args.source, args.heldout, args.sequences, args.seq_len, vocab_size, args.bad_text)
    total = step_count(list(models.values()))
    with steps("evaluate", total, "parts") as progress:
        found = measure(models, tokens, torch.device(args.device or some_device()), progress)
    heldout = {
        "file": args.heldout.name,
        "sha256": hashlib.sha256(args.heldout.read_bytes()).hexdigest(),
        "tokens": tokens.numel(),
    }
    content = {"heldout": heldout, "unigram_perplexity": unigram_perplexity(tokens), **found}
    write_json(args.out, {**content, "sums_sha256": sums_sha256(args.artifact)})  # which artifact they are of


if __name__ == "__main__":
    run_main(main)
