"""Writes all that is known of a run as one HTML page, its tables as Markdown, its figures as CSV.

    python -m scripts.report --work scratch/tiny
    python -m scripts.report --work scratch/tiny --peer scratch/by-hand/artifact

Takes what is in the folder: reports/run.json, layers/, the artifact's certificate and manifest, and the newest result
of each bench, and of those in reports/baseline; says which command makes what is not there. Writes reports/index.html,
reports/benchmarks.md and reports/figures.csv. Ends with `certificate: ok`, or with exit code 1 when the artifact's
certificate is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from v4forge import artifact_folder
from v4forge.errors import UserError, run_main
from v4forge.files import write_text
from v4forge.reporting import prediction, run_sections, two_engines
from v4forge.reporting.tables import plus_minus

from .cli import DEVICE, parser_for, some_device, steps

if TYPE_CHECKING:
    from v4forge.bench.results import Result
    from v4forge.reporting.inputs import Inputs


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for("report", __doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="scratch/<profile>")
    parser.add_argument(
        "--peer",
        type=Path,
        metavar="DIR",
        help="a calibration of the same source by another engine, its layers or its artifact, to be set beside this "
        "one (default: one that lies in --work)",
    )
    parser.add_argument(
        "--price",
        type=float,
        metavar="X",
        help="of an hour of the machine, in any currency: what a million tokens cost",
    )
    parser.add_argument("--device", help=f"that compares codes; {DEVICE}")
    args = parser.parse_args(argv)

    if args.price is not None and not 0 < args.price < math.inf:
        raise UserError(f"a price of {args.price:g} an hour is none", "make report PRICE=30")
    from v4forge.reporting import figures_csv, page
    from v4forge.reporting.gather import CSV, MARKDOWN, PAGE, gathered, markdown

    compare_engines(args.work, args.peer, args.device)
    inputs, measured = gathered(args.work, args.price)
    write_text(args.work / CSV, figures_csv.text(inputs))
    inputs = replace(inputs, pages=[*inputs.pages, *([] if CSV in inputs.pages else [CSV])])
    write_text(args.work / MARKDOWN, markdown(inputs))
    write_text(args.work / PAGE, page.page(inputs))
    show(inputs, measured, args.work / PAGE)
    return 0 if inputs.certificate is None or artifact_folder.verdict(inputs.certificate).ok else 1


def compare_engines(work: Path, peer: Path | None, device: str | None) -> None:
    """Sets another engine's calibration beside this one, where there is one and nobody has done so."""
    from v4forge.verification import engines

    ours = engines.own(work) if work.is_dir() else None
    if ours is None:
        if peer:
            raise UserError(f"{work} has neither layers nor an artifact", "make calibrate")
        return
    theirs = engines.opened(peer) if peer else engines.beside(work, ours)
    if theirs is None or engines.is_kept(work, ours, theirs):
        return
    import torch

    with steps("report", len(ours.files), "layers") as progress:
        engines.update(work, ours, theirs, torch.device(device or some_device()), progress)


def address(work: Path) -> str:
    """Of the page, for a browser."""
    from v4forge.reporting.gather import PAGE

    return (work.absolute() / PAGE).as_uri()


def show_again(work: Path) -> None:
    """What a report said when it was written; nothing is written."""
    from v4forge.reporting.gather import gathered

    show(*gathered(work))


def show(inputs: Inputs, measured: dict[str, Result], page: Path | None = None) -> None:
    """What there is, in a terminal; `page` was written of it."""
    from v4forge.reporting import page as report_page

    console = Console(highlight=False)
    verdict = artifact_folder.verdict(inputs.certificate) if inputs.certificate is not None else None
    if inputs.deep:
        console.print(models_table(inputs.deep))
    for check in verdict.checks if verdict else ():
        if not check.ok:
            console.print(f"failed: {check.name}: {check.detail}", markup=False, style="red")
    for sentence in two_engines.said(inputs.engines) if inputs.engines else ():
        console.print(sentence, markup=False)
    if stages := run_sections.stage_rows(inputs.run):
        console.print(run_sections.stages_line(stages), markup=False)
    for bench, result in measured.items():
        said = "; ".join([result.path.name, *inputs.benches[bench].worth.marks])
        console.print(f"{bench}: {said}", markup=False, soft_wrap=True)
    if page:
        console.print(f"report: {page}", markup=False, soft_wrap=True)
    if verdict:
        console.print(verdict.line, markup=False, style="bold green" if verdict.ok else "bold red")
    else:
        console.print(f"{report_page.NO_CERTIFICATE} (make verify)", markup=False, style="bold")


def models_table(deep: Mapping[str, Any]) -> Table:
    """The same as the page's, for 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, caption=prediction.text_line(deep), caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("size, MB", "KL, nats", "same", "perplexity", "drafts"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in prediction.model_rows(deep):
        table.add_row(
            row.name,
            "" if row.megabytes is None else f"{row.megabytes:,.1f}",
            "" if row.kl is None else plus_minus(row.kl, ".4f"),
            "" if row.agreement is None else f"{100 * row.agreement.value:.1f}%",
            f"{row.perplexity.value:.3f}",
            f"{100 * row.drafts[0].value:.1f}%",
        )
    return table


if __name__ == "__main__":
    run_main(main)
