"""Says what a checkpoint is, from config.json, index and headers: form, release, parts, certificate, what it fits on.

    python -m scripts.inspect_checkpoint DIR [--json]

DIR is an upstream checkpoint, an artifact, or calibrate's layers; config.json and the index alone will do, and bytes
are then those that the layout asks for. No tensor is read. Exit code 1 for what is no checkpoint that this project
knows, or has other tensors than its config.json asks for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from v4forge.errors import run_main
from v4forge.hints import as_called
from v4forge.units import decimal_size, size

from .cli import parser_for, table_console

if TYPE_CHECKING:
    from v4forge.pipeline.inspection import Inspection

FORMATS = {
    "fp4": "FP4, groups of 32",
    "mxfp4": "MXFP4, groups of 32",
    "fp8": "FP8, blocks of 128",
    "fp8-ct": "FP8, blocks of 128",
    "int4": "INT4, groups of 128",
    "bf16": "BF16",
    "f32": "F32",
    "int": "integers",
}
TITLES = {
    "upstream": "an upstream checkpoint, FP4 and FP8",
    "decoded": "decoded to BF16, as dequant writes it for other tools",
    "artifact": "an artifact",
    "layer folder": "finished layers of calibrate",
    "other": "no checkpoint that this project knows",
}


def facts(found: Inspection) -> list[tuple[str, str]]:
    """What is said of it in a line each."""
    rows = [("form", TITLES[found.form] + (f", {found.made}" if found.made else ""))]
    if found.why:
        rows.append(("why", found.why))
    if found.model:
        rows.append(("model", found.model))
    if found.layers and found.form != "layer folder":
        there = "there" if found.measured else "asked for by config.json"
        rows.append(("MTP block", there if found.mtp else "NOT there, or not whole"))
        rows.append(("release", found.release or "nothing here says where it comes from"))
    if found.finished:
        rows.append(("layers", f"{len(found.finished)}: {', '.join(map(str, found.finished))}"))
    rows.append(("files", files(found)))
    if found.differing:
        more = f" … and {found.differing - len(found.faults)} more" if found.differing > len(found.faults) else ""
        rows.append(("tensors", "; ".join(found.faults) + more))
    elif found.layers and found.measured and found.form != "layer folder":
        rows.append(("tensors", f"{sum(part.tensors for part in found.parts):,}, each as config.json asks for it"))
    if found.certificate:
        rows.append(("certificate", f"{found.certificate}: {found.certificate_fact}"))
    return rows


def files(found: Inspection) -> str:
    if not found.shards:
        return "no index and no shards: bytes below are what the layout asks for"
    here = found.shards - len(found.missing) - found.coming
    text = f"{here} of {found.shards} shards, {decimal_size(found.file_bytes)}"
    if found.coming:
        text += f"; of {found.coming} that fetch is bringing the headers"
    if found.missing:
        text += f"; without the headers of {len(found.missing)}, bytes below are what the layout asks for"
    return text


def show(found: Inspection) -> None:
    console = table_console()
    print(found.folder)
    told = facts(found)
    width = max(len(name) for name, _ in told)
    for name, text in told:
        print(f"  {name:<{width}}  {text}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("part", footer="all")
    table.add_column("format")
    for heading, footer in (
        ("tensors", f"{sum(part.tensors for part in found.parts):,}"),
        ("bytes", decimal_size(found.bytes)),
        ("", ""),
    ):
        table.add_column(heading, footer=footer, justify="right")
    for part in found.parts:
        share = f"{100 * part.bytes / max(found.bytes, 1):.1f}%"
        table.add_row(
            part.kind, FORMATS.get(part.format, part.format), f"{part.tensors:,}", decimal_size(part.bytes), share
        )
    if found.parts:
        console.print(table)
    for fit in found.fits:
        serve, calibrate = (f"{n or 'more than 8'}" for n in (fit.serve, fit.calibrate))
        print(f"  {fit.gpu}, {size(fit.memory_bytes)}: serves on {serve}, calibrates Flash's samples on {calibrate}")
    if found.fits:
        print(f"  of the artifact's {decimal_size(found.artifact_bytes)} the weights; the KV cache has what is left")
    if found.certificate == "ok":
        print(as_called(f"  each byte: python -m scripts.verify --artifact {found.folder} --sums-only"))


def main() -> int:
    parser = parser_for("inspect_checkpoint", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of a checkpoint")
    parser.add_argument("--json", action="store_true", help="as JSON, bytes as numbers")
    arguments = parser.parse_args()

    from v4forge.pipeline.inspection import OTHER, inspect

    found = inspect(arguments.folder)
    if arguments.json:
        print(json.dumps(found.json(), indent=1))
    else:
        show(found)
    return 1 if found.form == OTHER or found.differing else 0


if __name__ == "__main__":
    run_main(main)
