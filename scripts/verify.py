"""Checks every tensor of an artifact: against what its config asks for and, with --source, against the upstream bytes.

    python -m scripts.verify --artifact DIR --source DIR --expect gptq
    python -m scripts.verify --artifact DIR --source DIR --deep 8192
    python -m scripts.verify --artifact DIR --sums-only
    python -m scripts.verify --artifact DIR --source DIR --deep 8192 --beside ANOTHER

Writes certificate.json into the artifact; docs/verify.md lists the checks. --sums-only makes none: it says whether the
bytes are still the certified ones, as fast as they can be read. Exit code 0 when none fails, 1 when one does; a
statistic that --deep outvotes is a warning.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from v4forge import artifact_folder, certified
from v4forge.artifact_folder import CERTIFICATE, SIGNATURE
from v4forge.checkpoint.recipe import RECIPES
from v4forge.digests import Digests, cache_of
from v4forge.errors import UserError, run_main
from v4forge.model.heldout import FORMS, SHORTEST
from v4forge.outcomes import FAILED, OK, WARNING
from v4forge.quantization.layer_files import ENGINES, METHODS

from . import certified as certified_program
from .cli import DEVICE, parser_for, some_device, steps

SHOWN = {OK: "[green]ok[/]", WARNING: "[yellow]warning[/]", FAILED: "[red]FAILED[/]"}

if TYPE_CHECKING:
    from v4forge.checkpoint.reader import Checkpoint
    from v4forge.model.evaluation import Quality
    from v4forge.verification import prediction


def chosen_text(arguments: argparse.Namespace, source: Checkpoint) -> prediction.Text | None:
    """What the models are to run over; None without --deep and --tokens."""
    from v4forge.verification import prediction

    if arguments.tokens:
        return prediction.given(source, arguments.tokens)
    if arguments.deep:
        return prediction.held_out(source, arguments.heldout, arguments.deep, arguments.seq_len)
    return None


def main() -> int:
    parser = parser_for("verify", __doc__)
    parser.add_argument(
        "--artifact", type=Path, required=True, metavar="DIR", help="the folder to check; gets certificate.json"
    )
    parser.add_argument(
        "--source",
        type=Path,
        metavar="DIR",
        help="the upstream checkpoint it was made from; without it only structure and statistics are checked",
    )
    parser.add_argument(
        "--expect",
        choices=tuple(METHODS),
        default="",
        help="how the routed experts must have been quantized; needs --source (default: all layers alike)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="",
        help="whose GPTQ it must be, by its manifest, whose settings the layers' fingerprint covers (default: any)",
    )
    parser.add_argument(
        "--recipe", choices=tuple(RECIPES), default="", help="by which it must be made (default: any, by its config)"
    )
    parser.add_argument(
        "--no-hash",
        action="store_true",
        help="leave SHA-256 out: as fast as the disk, but a flipped bit of a code stays unseen",
    )
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="write it there, and nothing into the artifact"
    )
    parser.add_argument("--sums-only", action="store_true", help="compare every byte with what was certified, and stop")
    certified_program.add_key(parser)
    deep = parser.add_argument_group(
        "prediction",
        "runs both models over the same tokens, a layer at a time: perplexity, divergence, draft acceptance",
    )
    chosen = deep.add_mutually_exclusive_group()
    chosen.add_argument("--deep", type=int, metavar="N", help="over about N tokens of --heldout; needs --source")
    chosen.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help=f"over given sequences, a server's own output, say, of which drafts behind the prompt count: {FORMS}",
    )
    deep.add_argument(
        "--heldout",
        type=Path,
        metavar="FILE",
        help="text that nothing was fitted to, .txt or .jsonl (default: heldout.txt of the source, if it has one)",
    )
    deep.add_argument("--seq-len", type=int, default=512, help="tokens of a sequence of --deep (default: %(default)s)")
    deep.add_argument(
        "--beside",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="another artifact of this source, over the same tokens: round-to-nearest, say; may be given again",
    )
    deep.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads: the last digits depend on it (default: torch's own)"
    )
    parser.add_argument("--device", help=f"of matrices that are compared, and of models: {DEVICE}")
    arguments = parser.parse_args()
    for option in ("expect", "deep", "tokens"):
        if getattr(arguments, option) and not arguments.source:
            parser.error(f"argument --{option}: only with --source is there something to compare with")
    if arguments.seq_len < SHORTEST or (arguments.deep is not None and arguments.deep < arguments.seq_len):
        parser.error(f"--seq-len is at least {SHORTEST}, --deep at least one sequence")
    if arguments.beside and not (arguments.deep or arguments.tokens):
        parser.error("argument --beside: only --deep or --tokens run a model")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error("argument --threads: it must be at least 1")
    if not arguments.artifact.is_dir():
        raise UserError(f"{arguments.artifact} does not exist", "pass the folder of an artifact: make postprocess")
    if arguments.sums_only:
        return certified_program.sums_only(arguments.artifact, arguments.verify_key)
    if arguments.verify_key:
        parser.error("argument --verify-key: it is for --sums-only; this run makes a certificate of its own")

    import torch

    from v4forge.checkpoint.reader import Checkpoint
    from v4forge.model import evaluation
    from v4forge.verification import certificate, prediction

    for name in (CERTIFICATE, SIGNATURE) if not arguments.certificate else ():
        with suppress(OSError):  # whatever ends this run early, no certificate of an earlier one remains
            (arguments.artifact / name).unlink()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    source = Checkpoint(arguments.source) if arguments.source else None
    device = torch.device(arguments.device or some_device())
    digests = Digests(cache_of(arguments.artifact.parent))
    size = sum(path.stat().st_size for path in arguments.artifact.glob("*.safetensors")) >> 20
    text = chosen_text(arguments, source) if source else None  # before anything that takes long
    others = prediction.beside(arguments.beside, source) if source else {}
    models: dict[str, Checkpoint] = {}
    # progress is in MiB; running the models is shown as as much again
    with steps("verify", 2 * size if text else size, "MiB") as advance:

        def compare(source: Checkpoint, artifact: Checkpoint) -> list[Quality]:
            assert text
            models.update({"source": source, "artifact": artifact, **others})
            return prediction.compare(
                models, text, device, lambda done, of, what: advance(size + size * done // of, what)
            )

        checks, not_run, qualities = certificate.verify(
            arguments.artifact,
            source,
            digests,
            lambda done, of: advance(size * done // max(of, 1), ""),
            arguments.expect,
            not arguments.no_hash,
            compare if text else None,
            arguments.engine,
            arguments.recipe,
            device,
        )
    figures = prediction.figures(models, qualities, text) if text and qualities else None
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "detail"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, SHOWN[check.status], escape(check.detail))
    for name, why in not_run.items():
        table.add_row(name, "[dim]not run[/]", f"[dim]{why}[/]")
    Console().print(table)
    if qualities:
        Console().print(evaluation.table(qualities, list(models)))
    if made := prediction.made_how(arguments.artifact):
        print(f"routed experts: {made}")
    result = certificate.content(arguments.artifact, checks, not_run, digests, figures)
    conclusion = artifact_folder.verdict(result)
    print(conclusion.line + (f", in {arguments.certificate}" if arguments.certificate else ""))
    if conclusion.ok:
        certified.remember(arguments.artifact, digests)
    with suppress(UserError):  # where nothing is remembered, the next run reads again
        digests.save()
    certificate.write(arguments.certificate or arguments.artifact / CERTIFICATE, result)
    return 0 if conclusion.ok else 1


if __name__ == "__main__":
    run_main(main)
