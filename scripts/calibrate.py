"""Quantizes the routed experts of a DeepSeek-V4 checkpoint to INT4, one decoder layer at a time, straight from its
FP4/FP8 bytes. Each finished layer is one file in --work; run the same command again to continue after a stop.

On several GPUs, or several CPU processes, where any number gives the same bytes:
torchrun --nproc-per-node 8 -m scripts.calibrate …
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4forge import digests
from v4forge.checkpoint.layout import upstream
from v4forge.checkpoint.recipe import RECIPES
from v4forge.errors import UserError, run_main
from v4forge.files import exclusive, read_json, write_text
from v4forge.model import corpus, corpus_rows, hub_rows
from v4forge.pipeline import out_of_memory, requirements
from v4forge.quantization import layer_files
from v4forge.verification import reproduce

from .cli import DEVICE, parser_for, some_device, steps

if TYPE_CHECKING:
    import torch

    from v4forge.checkpoint.reader import Checkpoint
    from v4forge.model import distributed


def main() -> None:
    defaults = layer_files.Settings()
    parser = parser_for("calibrate", __doc__)
    add = parser.add_argument
    add("--source", type=Path, required=True, metavar="DIR", help="upstream shards, index, config.json, tokenizer.json")
    add("--work", type=Path, required=True, metavar="DIR", help="gets a layer-NNN.safetensors and a report a layer")
    forms = '.jsonl of {"messages": […]}, {"conversations": […]} or {"text": …}, or .txt, also .gz'
    add("--corpus", metavar="FILE", help=f"{forms}, or {hub_rows.FORM} (default: the pinned UltraChat split)")
    refuse = corpus_rows.BAD_TEXT[0]
    add("--bad-text", choices=corpus_rows.BAD_TEXT, default=refuse, help="what is no text: an error, or U+FFFD instead")
    add("--samples", type=int, default=768, help="calibration samples (default: %(default)s)")
    add("--seq-len", type=int, default=512, help="tokens a sample (default: %(default)s)")
    add("--seed", type=int, default=42, help="picks the samples (default: %(default)s)")
    kinds = "; ".join(f"{name}: {what}" for name, what in RECIPES.items())
    add("--recipe", choices=tuple(RECIPES), default=defaults.recipe, help=f"{kinds} (default: %(default)s)")
    add(
        "--method",
        choices=tuple(layer_files.METHODS),
        default=defaults.method,
        help="rtn: round-to-nearest, without a corpus, to compare with (default: %(default)s)",
    )
    rule = "of GPTQ; absmax is llm-compressor's default rule (default: %(default)s)"
    add("--scales", choices=layer_files.SCALES, default=defaults.scales, help=rule)
    add("--engine", choices=layer_files.ENGINES, default=defaults.engine, help="whose GPTQ (default: %(default)s)")
    add(
        "--dampening",
        type=float,
        default=defaults.dampening,
        help="share of the mean of the Hessian's diagonal (default: %(default)s)",
    )
    add(
        "--calibrate-all-experts",
        action="store_true",
        help="every token through every expert, not only through those that routing picks",
    )
    add(
        "--micro-batch-tokens",
        type=int,
        default=defaults.micro_batch_tokens,
        metavar="TOKENS",
        help="of a forward pass, which has one sample at least; part of what fixes the bytes (default: %(default)s)",
    )
    add(
        "--threads",
        type=int,
        default=defaults.threads,
        help="CPU threads; they are part of what fixes the bytes (default: %(default)s)",
    )
    add("--device", help=DEVICE)
    add(
        "--on-mismatch",
        choices=("refuse", "move"),
        default="refuse",
        help="when --work holds layers of other inputs, settings or code (default: %(default)s)",
    )
    add(
        "--keep-every",
        type=int,
        default=requirements.KEEP_EVERY,
        metavar="LAYERS",
        help="keep hidden states on disk every so many layers, to resume from; 0: never (default: %(default)s)",
    )
    original = "a manifest.json: compare every finished layer with it, and stop at the first difference"
    add("--compare", type=Path, metavar="FILE", help=original)
    add("--dry-run", action="store_true", help="check source and corpus, say what is to be done, and stop")
    arguments = parser.parse_args()
    for option, least in (("micro_batch_tokens", 1), ("threads", 1), ("keep_every", 0)):
        if getattr(arguments, option) < least:
            parser.error(f"argument --{option.replace('_', '-')}: it must be at least {least}")
    if not 0 < arguments.dampening < math.inf:
        parser.error("argument --dampening: it must be a positive number")

    import torch

    from v4forge.model import distributed

    try:
        device = torch.device(arguments.device or some_device())
    except RuntimeError as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"argument --device: there is no {device} here")
    torch.set_num_threads(arguments.threads)
    with distributed.joined(device) as (place, own_device):
        run(arguments, place, own_device)


def run(arguments: argparse.Namespace, place: distributed.Ranks, device: torch.device) -> None:
    settings = layer_files.Settings(
        recipe=arguments.recipe,
        method=arguments.method,
        scales=arguments.scales,
        engine=arguments.engine,
        dampening=arguments.dampening,
        experts="all" if arguments.calibrate_all_experts else "routed",
        micro_batch_tokens=arguments.micro_batch_tokens,
        threads=arguments.threads,
    )
    from v4forge.checkpoint.reader import Checkpoint

    source = Checkpoint(arguments.source).made_by(settings.recipe)
    source.validate(upstream(source.config))
    original = reproduce.load(arguments.compare) if arguments.compare else None
    samples, mark = place.told_after(lambda: prepared(arguments, settings, source, device))
    todo = source.config.layers
    if place.rank == 0:
        done = [i for i in todo if layer_files.finished(arguments.work, i, digests.digest_of(mark))]
        on = str(device) if place.size == 1 else f"{place.size} ranks, {device.type}"
        print(f"{len(todo)} layers, {len(done)} finished; {samples.description if samples else 'no corpus'}; {on}")
    comparison = None
    if original is not None:
        comparison = compared(original, arguments.work, mark, place, device)
    if arguments.dry_run:
        return
    with ExitStack() as held:
        if place.rank == 0:
            held.enter_context(sole_run(arguments.work))
        calibrated(arguments, settings, source, samples, mark, place, device, comparison)


def compared(
    original: reproduce.Original, work: Path, mark: Mapping[str, Any], place: distributed.Ranks, device: torch.device
) -> reproduce.Comparison:
    """How layers are compared with a manifest; says first what lets them differ. Raises UserError for other inputs."""
    reproduce.check_inputs(original, mark)
    differing = reproduce.differences(original, mark, place.size)
    if place.rank == 0:
        for line in differing:
            print(f"byte identity is not promised: {line}", flush=True)
    return reproduce.Comparison(original, work, not differing, device)


def sole_run(work: Path) -> AbstractContextManager[int]:
    """Keeps a second run out of `work` while this one lives: the files that ranks fill together have fixed names."""
    busy = UserError(f"another run is writing to {work}", "wait until it has ended, or choose another --work")
    return exclusive(work.parent / ".stamps" / f"{work.name}.lock", lambda: busy)


def calibrated(
    arguments: argparse.Namespace,
    settings: layer_files.Settings,
    source: Checkpoint,
    samples: corpus.Corpus | None,
    mark: Mapping[str, Any],
    place: distributed.Ranks,
    device: torch.device,
    comparison: reproduce.Comparison | None = None,
) -> None:
    from v4forge.quantization import calibrate

    todo = source.config.layers
    if place.rank == 0:
        layer_files.claim(arguments.work, mark, arguments.on_mismatch, print)
        kept = samples.tokens.shape if samples and arguments.keep_every else (0, 0)
        requirements.require_space(requirements.calibration_parts(source.config, arguments.work, *kept), arguments.work)
    place.barrier()
    page = arguments.work / "calibration.html"
    lines: list[str] = []  # one a layer that this run has finished

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    def finished(report: Mapping[str, Any]) -> None:
        if comparison is not None:
            print(comparison.layer(report), flush=True)

    if place.rank == 0:
        for layer in todo:
            if layer_files.finished(arguments.work, layer, digests.digest_of(mark)):
                finished(read_json(layer_files.layer_report(arguments.work, layer)))
    place.barrier()
    shown = steps("calibrate", len(todo), "layers", resumes=True)
    memory = out_of_memory.explained(settings.micro_batch_tokens, arguments.seq_len)
    with memory, shown if place.rank == 0 else nullcontext(lambda *_: None) as progress:
        calibrate.calibrate(
            source,
            samples,
            arguments.work,
            settings,
            mark,
            device,
            place,
            keep_every=arguments.keep_every,
            progress=progress,
            log=say,
            finished_layer=finished,
        )
    if place.rank == 0 and settings.method == "gptq" and (lines or not page.exists()):
        from v4forge.reporting import calibration_page

        write_text(page, calibration_page.page([read_json(layer_files.layer_report(arguments.work, i)) for i in todo]))
        print(f"calibration: {page}")


def prepared(
    arguments: argparse.Namespace, settings: layer_files.Settings, source: Checkpoint, device: torch.device
) -> tuple[corpus.Corpus | None, dict[str, Any]]:
    """The samples and the fingerprint."""
    samples = None
    if settings.method == "gptq":
        vocab_size = source.config.vocab_size
        text = hub_rows.named(arguments.corpus) if arguments.corpus else None
        sizes = (arguments.samples, arguments.seq_len, arguments.seed, vocab_size)
        samples = corpus.load(arguments.source, text, *sizes, arguments.bad_text)
    cache = digests.cache_of(arguments.work.parent)
    hashes = layer_files.source_digests(arguments.source, source.shard_names, cache)
    return samples, layer_files.fingerprint(hashes, samples, settings, device)


if __name__ == "__main__":
    run_main(main)
