"""Prints the table of a finished run and writes it, with losses, checks and provenance, as one HTML page.

    python -m scripts.report --evaluation scratch/tiny/reports/evaluation.json --layers scratch/tiny/layers \\
        --artifact scratch/tiny/artifact --run scratch/tiny/reports/run.json --out scratch/tiny/reports/index.html

Ends with `certificate: ok`, or with exit code 1 when the artifact's certificate is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from scripts.cli import parser_for
from v4forge import report
from v4forge.errors import UserError, run_main
from v4forge.files import write_text
from v4forge.layer_rows import layer_rows

T = TypeVar("T")


def read(path: Path, hint: str) -> dict[str, Any]:
    """The object in a JSON file; raises UserError when it is missing or something else."""
    if not path.is_file():
        raise UserError(f"{path} does not exist", hint)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", hint) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", hint)
    return value


def understood(path: Path, hint: str, rows: Callable[[], T]) -> T:
    """What `rows` makes of the content of `path`; raises UserError when its form is another."""
    try:
        return rows()
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]!r}", hint) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has another form than expected: {error}", hint) from None


def check_certificate(artifact: Path, certificate: dict[str, Any]) -> None:
    """Raises UserError when the certificate is about other files than the artifact's."""
    sums = artifact / "SHA256SUMS"
    if not sums.is_file():
        raise UserError(f"{sums} does not exist", "make postprocess")
    if certificate["sums_sha256"] != hashlib.sha256(sums.read_bytes()).hexdigest():
        raise UserError(f"{artifact / 'certificate.json'} is about other files than {sums}", "make verify")


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for("report", __doc__)
    parser.add_argument("--evaluation", type=Path, required=True, metavar="FILE", help="evaluation.json, of evaluate")
    parser.add_argument("--layers", type=Path, required=True, metavar="DIR", help="the layer reports, of calibrate")
    parser.add_argument("--artifact", type=Path, required=True, metavar="DIR", help="holds certificate and manifest")
    parser.add_argument("--run", type=Path, metavar="FILE", help="run.json: seconds per stage (default: left out)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, index.html")
    args = parser.parse_args(argv)

    evaluation = read(args.evaluation, "make demo")
    certificate_file, manifest_file = args.artifact / "certificate.json", args.artifact / "manifest.json"
    certificate = read(certificate_file, "make verify")
    manifest = read(manifest_file, "make postprocess")
    layer_files = sorted(args.layers.glob("layer-*.json"))
    if not layer_files:
        raise UserError(f"{args.layers} holds no layer report, layer-000.json and so on", "make calibrate")
    layers = [read(path, "make calibrate") for path in layer_files]
    run = read(args.run, "make demo, or leave --run out") if args.run else {}

    # Each file once by itself, so that an error names the file.
    table = understood(args.evaluation, "make demo", lambda: report.models_table(evaluation))
    verdict = understood(certificate_file, "make verify", lambda: report.verdict(certificate))
    understood(certificate_file, "make verify", lambda: check_certificate(args.artifact, certificate))
    stages = understood(args.run, "make demo, or leave --run out", lambda: report.stage_rows(run))
    for path, layer in zip(layer_files, layers, strict=True):
        understood(path, "make calibrate", lambda layer=layer: layer_rows([layer]))  # type: ignore[misc]

    write_text(args.out, report.page(evaluation, certificate, layers, run, manifest))
    console = Console(highlight=False)
    console.print(table)
    for check in verdict.checks:
        if not check.ok:
            console.print(f"failed: {check.name}: {check.detail}", markup=False, style="red")
    if stages:
        console.print(report.stages_line(stages), markup=False)
    console.print(f"report: {args.out}", markup=False, soft_wrap=True)
    console.print(verdict.line, markup=False, style="bold green" if verdict.ok else "bold red")
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    run_main(main)
