"""Says what a run needs before it starts: disk by folder, memory, and with --layer-seconds how long it takes.

    python -m scripts.plan --profile flash --work /scratch/flash --gpus 8 --layer-seconds 7

Reads config.json only. Exit code 1 when what is still to be written does not fit where --work lies.
"""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from scripts.cli import parser_for
from v4forge import plan
from v4forge.errors import run_main
from v4forge.layout import load_config
from v4forge.stages import PROFILES

FLASH = PROFILES["flash"]


def disk_table(parts: list[plan.Part]) -> Table:
    """The parts and their sum, in GB."""
    rows = [(part.whole_bytes, part.present_bytes, part.missing_bytes) for part in parts]
    sums = [sum(column) for column in zip(*rows, strict=True)]
    digits = 1 if sums[0] > 1e9 else 3
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("folder", "holds"):
        table.add_column(name, overflow="fold")
    for name in ("GB", "there", "to write"):
        table.add_column(name, justify="right")
    names = [(part.folder, part.holds) for part in parts]
    for (folder, holds), row in zip([*names, ("together", "")], [*rows, sums], strict=True):
        if folder == "together":
            table.add_section()
        table.add_row(folder, holds, *(f"{size / 1e9:,.{digits}f}" for size in row))
    return table


def time_lines(time: plan.LayerTime) -> list[str]:
    """The arithmetic of LayerTime."""
    slower = "disk" if time.disk_s > time.compute_s else "compute"
    return [
        f"a layer, disk:    read {time.read_bytes / 1e9:.1f} GB in {time.read_s:.1f} s"
        f" + write {time.write_bytes / 1e9:.1f} GB in {time.write_s:.1f} s = {time.disk_s:.1f} s",
        f"a layer, compute: {time.compute_s:.1f} s",
        f"calibrate:        {time.layers} layers x {time.layer_s:.1f} s ({slower}) = {time.total_s / 60:.1f} min",
    ]


def main() -> None:
    parser = parser_for("plan", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--source", type=Path, metavar="DIR", help="an upstream checkpoint; its config.json is enough")
    model.add_argument("--profile", choices=["flash"], help="DeepSeek-V4-Flash as published, nothing downloaded yet")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder to be; its free space is compared")
    for name, default, text in (
        ("--samples", FLASH.samples, "calibration samples"),
        ("--seq-len", FLASH.seq_len, "tokens in a sample"),
        ("--gpus", 1, "GPUs that share the samples"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    for name, does in (("--read-gbps", "reads"), ("--write-gbps", "writes")):
        text = f"gigabytes that the disk {does} a second (default: %(default)s)"
        parser.add_argument(name, type=float, default=5.0, metavar="GB", help=text)
    parser.add_argument(
        "--layer-seconds", type=float, metavar="S", help="measured compute of a layer on these GPUs; adds the time"
    )
    args = parser.parse_args()
    if min(args.samples, args.seq_len, args.gpus) < 1:
        parser.error("--samples, --seq-len and --gpus are at least 1")
    if not (args.read_gbps > 0 and args.write_gbps > 0):
        parser.error("--read-gbps and --write-gbps are more than 0")
    if args.layer_seconds is not None and not args.layer_seconds >= 0:
        parser.error("--layer-seconds is not negative")

    config = load_config(args.source) if args.source else plan.flash_config()
    sizes = plan.sizes_of(config)
    tokens = args.samples, args.seq_len
    parts = plan.disk_parts(config, sizes, *tokens, args.source, args.work)
    Console().print(disk_table(parts))
    share = math.ceil(args.samples / args.gpus)
    gpu, host = plan.gpu_bytes(config, share, args.seq_len), plan.host_bytes(config, sizes, *tokens, args.gpus)
    print(f"memory of each GPU: {gpu / 2**30:.1f} GiB, with {share} x {args.seq_len} tokens")
    print(f"memory of the host: {host / 2**30:.1f} GiB")
    if args.layer_seconds is not None:
        time = plan.layer_time(config, sizes, *tokens, args.read_gbps, args.write_gbps, args.layer_seconds)
        print("", *time_lines(time), sep="\n")
    if args.work:
        plan.require_space(parts, args.work)
        print(f"\n{args.work}: {plan.free_bytes(args.work) / 1e9:,.1f} GB free, enough")


if __name__ == "__main__":
    run_main(main)
