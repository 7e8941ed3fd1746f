"""Compares calibration policies by what they do to a model: which tokens make an expert's Hessian, and dampening.

    python -m benchmarks.policies --out benchmarks/results/policies-tiny.json

Each policy calibrates the embedded model at the settings of `make demo`, on several choices of samples, and is measured
on held-out tokens. Losses of policies whose Hessians see other tokens are not to be compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from scripts.cli import parser_for
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import run_main
from v4forge.files import write_json
from v4forge.intervals import Estimate
from v4forge.model import corpus
from v4forge.model.evaluation import Quality, evaluate, perplexity_change
from v4forge.model.heldout import tokens as heldout_tokens
from v4forge.pipeline.stages import PROFILES
from v4forge.quantization import calibrate, layer_files
from v4forge.quantization.layer_reports import mean_losses
from v4forge.quantization.postprocess import assemble
from v4forge.reporting.tables import plus_minus

CPU = torch.device("cpu")
TINY = PROFILES["tiny"]
HELDOUT = 32, 512  # sequences, and tokens in each
GPTQ = [layer_files.Settings(experts=seen, dampening=share) for seen, share in product(("routed", "all"), (0.01, 0.1))]
DEFAULT, NEAREST = layer_files.Settings(), layer_files.Settings(method="rtn")


@dataclass(frozen=True)
class Outcome:
    quality: Quality
    loss: dict[str, float]  # mean relative Hessian-weighted loss of GPTQ and of round-to-nearest; {} without Hessians
    calibrate_s: float


def outcome(settings: layer_files.Settings, seed: int, source: Checkpoint, heldout: torch.Tensor) -> Outcome:
    """Calibrates, assembles and evaluates in a folder that is gone afterwards. `seed` picks the samples."""
    samples = None
    if settings.method == "gptq":
        size = source.config.vocab_size
        samples = corpus.load(source.directory, Path(TINY.corpus), TINY.samples, TINY.seq_len, seed, size)
    with tempfile.TemporaryDirectory() as name:
        work, artifact = Path(name, "layers"), Path(name, "artifact")
        digests = layer_files.source_digests(
            source.directory, source.shard_names, Path(name, ".stamps", "digests.json")
        )
        mark = layer_files.fingerprint(digests, samples, settings, CPU)
        layer_files.claim(work, mark, "refuse", print)
        start = time.perf_counter()
        calibrate.calibrate(source, samples, work, settings, mark, CPU)
        calibrate_s = time.perf_counter() - start
        reports = [json.loads(layer_files.layer_report(work, i).read_text()) for i in source.config.layers]
        assemble(source, work, artifact)
        quality = evaluate(Checkpoint(artifact, form="artifact"), heldout, CPU)
    return Outcome(quality, means([mean_losses(report) for report in reports if report["error"]]), calibrate_s)


def means(losses: Sequence[dict[str, float]]) -> dict[str, float]:
    return {method: fmean(each[method] for each in losses) for method in ("gptq", "rtn") if losses}


def pooled(found: Sequence[Outcome]) -> Outcome:
    """The mean over several choices of samples; of log-likelihoods token by token."""
    qualities = [each.quality for each in found]
    nll = torch.stack([each.nll for each in qualities]).mean(0)
    judged, accepted = (torch.stack([getattr(q, n) for q in qualities]).sum(0) for n in ("judged", "accepted"))
    quality = replace(qualities[0], nll=nll, judged=judged, accepted=accepted)
    return Outcome(quality, means([each.loss for each in found]), fmean(each.calibrate_s for each in found))


def row(
    settings: layer_files.Settings, seed: int | str, found: Outcome, best: Quality, default: Quality
) -> dict[str, Any]:
    """One line's figures. Changes are percent of perplexity, with 95% intervals over the held-out sequences."""
    return {
        "settings": asdict(settings),
        "seed": seed,
        "perplexity": found.quality.perplexity,
        "change_from_source": perplexity_change(found.quality, best).json(),
        "change_from_default": perplexity_change(found.quality, default).json(),
        "mtp_acceptance": found.quality.mtp_acceptance,
        "loss": found.loss,
        "calibrate_s": found.calibrate_s,
    }


def table(rows: Sequence[dict[str, Any]], source: Quality) -> Table:
    caption = (
        f"source: perplexity {source.perplexity:.3f}, MTP acceptance {source.mtp_acceptance:.1%} of {source.tokens:,} "
        "held-out tokens; loss: of the outputs' energy, behind it round-to-nearest's under the same Hessians"
    )
    drawn = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for heading in ("Hessians of", "damp.", "samples", "perplexity", "to the default", "MTP acc.", "loss", "seconds"):
        drawn.add_column(heading, justify="left" if heading == "Hessians of" else "right", no_wrap=True)
    for each in rows:
        settings, loss = each["settings"], each["loss"]
        drawn.add_row(
            f"{settings['experts']} tokens" if loss else "round-to-nearest",
            f"{settings['dampening']}" if loss else "",
            str(each["seed"]),
            plus_minus(Estimate.of(each["change_from_source"]), "+.2f", "%"),
            plus_minus(Estimate.of(each["change_from_default"]), "+.2f", "%") if settings != asdict(DEFAULT) else "",
            f"{each['mtp_acceptance']:.1%}",
            f"{loss['gptq']:.3%} of {loss['rtn']:.3%}" if loss else "",
            f"{each['calibrate_s']:.0f}",
            end_section=each["seed"] in ("mean", ""),
        )
    return drawn


def main() -> None:
    parser = parser_for("policies", __doc__)
    parser.prog = "python -m benchmarks.policies"
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="gets every number as JSON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44], help="of the samples (default: 42 43 44)")
    args = parser.parse_args()
    torch.set_num_threads(DEFAULT.threads)
    source = Checkpoint(Path(TINY.source))
    heldout = heldout_tokens(source.directory, Path(TINY.heldout), *HELDOUT, source.config.vocab_size)
    best = evaluate(source, heldout, CPU)
    found: dict[layer_files.Settings, dict[int | str, Outcome]] = {}
    for settings in (*GPTQ, NEAREST):
        found[settings] = {}
        for seed in args.seeds if settings.method == "gptq" else [""]:
            found[settings][seed] = outcome(settings, int(seed or 0), source, heldout)
            print(settings, seed, f"perplexity {found[settings][seed].quality.perplexity:.4f}", file=sys.stderr)
        if settings.method == "gptq":
            found[settings]["mean"] = pooled(list(found[settings].values()))
    default = {**found[DEFAULT], "": found[DEFAULT]["mean"]}
    rows = [row(s, seed, o, best, default[seed].quality) for s, by in found.items() for seed, o in by.items()]
    command = " ".join(["python -m benchmarks.policies", *sys.argv[1:]])
    source_figures = {"perplexity": best.perplexity, "mtp_acceptance": best.mtp_acceptance, "tokens": best.tokens}
    write_json(args.out, {"command": command, **machine(CPU), "source": source_figures, "policies": rows})
    Console(width=120).print(table(rows, best))


if __name__ == "__main__":
    run_main(main)
