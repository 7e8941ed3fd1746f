"""Writes all that is known of a run as one HTML page, and the tables of its benches as Markdown.

    python -m scripts.report --work scratch/tiny

Takes what is in the folder: reports/evaluation.json, reports/run.json, layers/, the artifact's certificate and
manifest, and the newest result of each bench; says which command makes what is not there. Writes reports/index.html and
reports/benchmarks.md. Ends with `certificate: ok`, or with exit code 1 when the artifact's certificate is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scripts.cli import parser_for
from v4forge import headline, report, results, run_rows
from v4forge.bench_rows import standing
from v4forge.errors import UserError, run_main
from v4forge.files import write_text
from v4forge.glance import Inputs
from v4forge.layer_rows import layer_rows
from v4forge.results import Result, read, understood

PAGE, MARKDOWN = "reports/index.html", "reports/benchmarks.md"


def check_certificate(artifact: Path, certificate: dict[str, Any]) -> None:
    """Raises UserError when the certificate is about other files than the artifact's."""
    sums = artifact / "SHA256SUMS"
    if not sums.is_file():
        raise UserError(f"{sums} does not exist", "make postprocess")
    if certificate["sums_sha256"] != hashlib.sha256(sums.read_bytes()).hexdigest():
        raise UserError(f"{artifact / 'certificate.json'} is about other files than {sums}", "make verify")


def gathered(work: Path) -> tuple[Inputs, dict[str, Result]]:
    """What is in the folder, each file looked at once by itself, so that an error names it.

    Raises UserError for a file of another form, and where there is none at all.
    """
    files = {
        "evaluation": (work / "reports/evaluation.json", "make demo"),
        "run": (work / "reports/run.json", "make demo"),
        "certificate": (work / "artifact/certificate.json", "make verify"),
        "manifest": (work / "artifact/manifest.json", "make postprocess"),
    }
    found = {name: read(path, hint) for name, (path, hint) in files.items() if path.exists()}
    layer_files = sorted((work / "layers").glob("layer-*.json"))
    measured = results.newest(work / "reports")
    inputs = Inputs(
        evaluation=found.get("evaluation"),
        certificate=found.get("certificate"),
        layers=[read(path, "make calibrate") for path in layer_files],
        run=found.get("run", {}),
        manifest=found.get("manifest"),
        results={bench: result.content for bench, result in measured.items()},
    )
    if not (found.keys() - {"run"} or inputs.layers or inputs.results):
        raise UserError(f"{work} holds nothing to report on", "make demo, or make bench")

    checks: dict[str, tuple[Callable[[dict[str, Any]], object], ...]] = {
        "evaluation": (run_rows.models_table,),
        "run": (run_rows.stage_rows, run_rows.image_rows),
        "certificate": (run_rows.verdict, lambda each: check_certificate(work / "artifact", each)),
        "manifest": (run_rows.provenance, lambda each: headline.pipeline(inputs.run, each)),
    }
    for name, content in found.items():
        for check in checks[name]:
            understood(*files[name], partial(check, content))
    for path, layer in zip(layer_files, inputs.layers, strict=True):
        understood(path, "make calibrate", partial(layer_rows, [layer]))
    for bench, each in measured.items():
        understood(each.path, results.again(each.path, bench), partial(report.sections, {bench: each.content}))
    return inputs, measured


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for("report", __doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="scratch/<profile>")
    args = parser.parse_args(argv)

    inputs, measured = gathered(args.work)
    write_text(args.work / MARKDOWN, f"# Benchmarks\n\n{report.markdown(inputs)}")
    write_text(args.work / PAGE, report.page(inputs))
    show(inputs, measured, args.work / PAGE)
    return 0 if inputs.certificate is None or run_rows.verdict(inputs.certificate).ok else 1


def show(inputs: Inputs, measured: dict[str, Result], page: Path) -> None:
    """What there is, in a terminal."""
    console = Console(highlight=False)
    verdict = run_rows.verdict(inputs.certificate) if inputs.certificate is not None else None
    if inputs.evaluation:
        console.print(models_table(inputs.evaluation))
    for check in verdict.checks if verdict else ():
        if not check.ok:
            console.print(f"failed: {check.name}: {check.detail}", markup=False, style="red")
    if stages := run_rows.stage_rows(inputs.run):
        console.print(run_rows.stages_line(stages), markup=False)
    for bench, result in measured.items():
        said = "; ".join([result.path.name, *standing(result.content).marks])
        console.print(f"{bench}: {said}", markup=False, soft_wrap=True)
    console.print(f"report: {page}", markup=False, soft_wrap=True)
    if verdict:
        console.print(verdict.line, markup=False, style="bold green" if verdict.ok else "bold red")
    else:
        console.print(f"{report.NO_CERTIFICATE} (make verify)", markup=False, style="bold")


def models_table(evaluation: Mapping[str, Any]) -> Table:
    """The same as the page's, for 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, caption=run_rows.heldout_line(evaluation), caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("size, MB", "perplexity", "change", "MTP acc.", "points"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in run_rows.model_rows(evaluation):
        table.add_row(
            row.name,
            f"{row.megabytes:,.1f}",
            f"{row.perplexity:.3f}",
            "" if row.perplexity_change is None else "{:+.2f}±{:.2f}%".format(*row.perplexity_change),
            f"{row.acceptance:.1f}%",
            "" if row.acceptance_change is None else f"{row.acceptance_change:+.2f}",
        )
    return table


if __name__ == "__main__":
    run_main(main)
