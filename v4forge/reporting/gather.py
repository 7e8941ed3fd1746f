"""What there is to report on in a work folder, each file looked at once by itself, so that an error names it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from v4forge import artifact_folder
from v4forge.bench import results
from v4forge.bench.results import Result
from v4forge.errors import UserError
from v4forge.files import read, read_json, understood
from v4forge.quantization.layer_reports import layer_rows
from v4forge.reporting import header, page, prediction, published_comparison, run_sections, two_engines
from v4forge.reporting.benches import BENCHES, told
from v4forge.reporting.inputs import Inputs
from v4forge.verification import engines

PAGE, MARKDOWN, CSV = "reports/index.html", "reports/benchmarks.md", "reports/figures.csv"


def gathered(work: Path, price: float | None = None) -> tuple[Inputs, dict[str, Result]]:
    """What is in the folder, each file looked at once by itself, so that an error names it. price: of an hour of the
    machine.

    Raises UserError for a file of another form, and where there is none at all.
    """
    files = {
        "run": (work / "reports/run.json", "make demo"),
        "certificate": (work / "artifact/certificate.json", "make verify"),
        "manifest": (work / "artifact/manifest.json", "make postprocess"),
    }
    found = {name: read(path, hint) for name, (path, hint) in files.items() if path.exists()}
    layer_files = sorted((work / "layers").glob("layer-*.json"))
    sums = artifact_folder.sums_sha256(work / "artifact")
    measured = results.newest(work / "reports", BENCHES, sums)
    baseline = results.newest(work / "reports" / results.BASELINE, BENCHES)
    beside = engines.kept(work)
    inputs = Inputs(
        certificate=found.get("certificate"),
        layers=[read(path, "make calibrate") for path in layer_files],
        run=found.get("run", {}),
        manifest=found.get("manifest"),
        benches=told({bench: result.content for bench, result in measured.items()}, sums),
        baseline=told({bench: result.content for bench, result in baseline.items()}),
        engines=beside,
        price=price,
        profile=work.absolute().name,
        sums=sums,
        config=read_json(work / "artifact/config.json"),
        pages=[name for name in header.PAGES.values() if (work / name).exists()],
    )
    if not (found.keys() - {"run"} or inputs.layers or inputs.benches):
        raise UserError(f"{work} holds nothing to report on", "make demo, or make bench")

    checks: dict[str, tuple[Callable[[dict[str, Any]], object], ...]] = {
        "run": (run_sections.stage_rows, run_sections.image_rows, lambda each: header.rows(Inputs(run=each))),
        "certificate": (
            artifact_folder.verdict,
            lambda each: artifact_folder.check_certificate(work / "artifact", each),
            lambda each: prediction.table(each["deep"]) if each.get("deep") else None,
        ),
        "manifest": (run_sections.provenance, lambda each: published_comparison.pipeline(inputs.run, each)),
    }
    for name, content in found.items():
        for check in checks[name]:
            understood(*files[name], partial(check, content))
    if beside:
        understood(work / engines.FOUND, engines.AGAIN, lambda: (two_engines.table(beside), two_engines.said(beside)))
    for path, layer in zip(layer_files, inputs.layers, strict=True):
        understood(path, "make calibrate", partial(layer_rows, [layer]))
    for bench, each in measured.items():
        understood(each.path, results.again(each.path, bench), inputs.benches[bench].make)
    for bench, each in baseline.items():
        understood(each.path, results.again(each.path, bench), inputs.baseline[bench].make)
    for bench, each in baseline.items():
        if bench in inputs.ours:
            understood(each.path, results.again(each.path, bench), lambda: inputs.beside)
    return inputs, measured


def markdown(inputs: Inputs) -> str:
    """The tables of the benches as a file of their own."""
    return f"# Benchmarks\n\n{page.markdown(inputs)}"
