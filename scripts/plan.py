"""Says what a run needs before it starts: its stages in order, disk at the peak, memory, hours, and money.

    python -m scripts.plan --profile flash --work /scratch/flash --gpus 8 --price 30
    python -m scripts.plan --profile flash --on 8xH200

Looks at config.json and at names and sizes of files; measures the disk below --work for a few seconds. Exit code 1 when
what is still to be written does not fit where --work lies. With --on it plans for a machine of that kind, on which
nothing is yet, and says what it would need here; exit code 1 when that kind of machine cannot do it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from v4forge.checkpoint.layout import load_config
from v4forge.checkpoint.recipe import INT4, RECIPES
from v4forge.errors import run_main
from v4forge.pipeline import (
    disk_speed,
    estimate,
    events,
    machines,
    requirements,
    run_plan,
    run_state,
)
from v4forge.pipeline.estimate import Given, StageTime
from v4forge.pipeline.machines import Kind
from v4forge.pipeline.run_plan import Plan
from v4forge.pipeline.stages import PROFILES
from v4forge.units import GB, MB, decimal_size, duration, size

from .cli import parser_for, table_console

TEXT_WIDTH = 100
KIND = ("price", "gpu_memory_gb", "memory_gib", "disk_gb")  # of a kind of machine, besides its GPUs


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The runner's settings, as scripts.stage has them for the same options."""
    profile = arguments.profile or "flash"
    values = dataclasses.asdict(PROFILES[profile])
    values["work"] = str(arguments.work or Path("scratch") / profile)
    if arguments.on:  # nothing is there
        values["work"] = f"{arguments.on}:/scratch/{profile}"
    given = {key: getattr(arguments, key) for key in ("source", "samples", "seq_len") if getattr(arguments, key)}
    values |= {"profile": profile, "gpus": arguments.gpus, **given}
    values["source"] = str(values["source"] or f"{values['work']}/upstream")
    return values


def given_of(arguments: argparse.Namespace) -> Given:
    """What the user says, and what is measured here now."""
    speed, basis = None, "as given"
    if arguments.read_gbps or arguments.write_gbps:
        read, write = ((gbps or 0.0) * GB for gbps in (arguments.read_gbps, arguments.write_gbps))
        speed = run_plan.given_speed(arguments.work, read, write)
    elif (
        arguments.work
        and arguments.measure
        and not arguments.on
        and arguments.profile != "tiny"
        and not disk_speed.known(arguments.work)
    ):
        speed, basis = run_plan.speed_here(arguments.work), "measured now"
    network = arguments.network_gb_s * GB if arguments.network_gb_s else None
    return Given(speed, basis, network, arguments.layer_seconds)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the options ask for. Raises UserError for a --source without its config.json."""
    values = settings_of(arguments)
    source = arguments.source
    config = load_config(source) if source else requirements.config_of(Path(values["source"]))
    config = dataclasses.replace(config, recipe=arguments.recipe)
    model = source or ("DeepSeek-V4-Flash" if values["profile"] == "flash" else values["source"])
    return run_plan.of_run(values, config, given_of(arguments), str(model))


def memory(count: int | None) -> str:
    return "" if count is None else size(count)


def stage_table(found: Plan, price: float | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    there = {row.step.stage: "done" if row.estimate.basis == "done" else row.step.there for row in found.rows}
    if any(there.values()):
        table.add_column("there", overflow="fold")
    for name in ("to write", "on disk", "a GPU", "host", "time", *(["cost"] if price else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        step, each = row.step, row.estimate
        idle = each.seconds == 0
        told = "" if idle else "unknown" if each.seconds is None else duration(each.seconds)
        cost = [] if not price else ["" if not each.seconds else money(each.seconds, price)]
        written = decimal_size(step.writes_bytes) if step.writes_bytes and not idle else ""
        needs = ["", ""] if idle else [memory(row.gpu_bytes), memory(row.host_bytes)]
        start = [step.stage, there[step.stage]] if any(there.values()) else [step.stage]
        table.add_row(*start, written, decimal_size(step.held_bytes) if step.held_bytes else "", *needs, told, *cost)
    return table


def money(seconds: float, price: float) -> str:
    return f"{seconds / 3600 * price:,.2f}"


def conclusions(found: Plan, price: float | None) -> list[str]:
    """Disk, time and money of the whole run."""
    names = [row.step.stage for row in found.rows]
    leaves = found.rows[-1].step.held_bytes
    lines = [
        f"disk   {decimal_size(found.fullest.held_bytes)} at the fullest, in {found.fullest.stage};"
        f" {decimal_size(leaves)} stay; {decimal_size(found.room_bytes)} must be free"
    ]
    total = found.total
    assumed = [row.step.stage for row in found.rows if row.estimate.seconds is None and row.estimate.assumed_s]
    text = f"{'at least ' if total.unknown else ''}{duration(total.seconds)}"
    if total.unknown and not total.seconds:
        text = "unknown"
    if total.unknown:
        text += f"; nobody has measured {', '.join(total.unknown)}"
    if price:
        text += f"; {money(total.seconds, price)} at {price:,.2f} an hour, for these stages alone"
    if assumed:
        rate = estimate.ASSUMED_NETWORK_BYTES_S / MB
        text += f"; {', '.join(assumed)} assumed at {rate:,.0f} MB/s: NETWORK_GB_S=, or --network-gb-s, says other"
    lines.append(f"time   {text}")
    ahead = [row.step.stage for row in found.rows if row.seconds]
    if pair := estimate.overlapping([name for name in names if name in ahead]):
        lines.append(f"       {pair[1]} begins on the first files of {pair[0]}: of the two the longer one counts")
    return lines


def bases(found: Plan, kind: Kind | None = None) -> list[str]:
    """What each figure rests on."""
    width = max(len(row.step.stage) for row in found.rows)
    told = {row.step.stage: row.estimate.basis for row in found.rows if row.estimate.basis != "done"}
    if found.disk_basis:
        told["disk"] = found.disk_basis
    told |= kind.basis if kind else {}
    indent = " " * (width + 4)
    return [
        textwrap.fill(f"  {name:<{width}}  {text}", TEXT_WIDTH, subsequent_indent=indent) for name, text in told.items()
    ]


def last_run(work: Path) -> list[str]:
    """The last run here: what was estimated beside what it took."""
    history = events.read(events.file_of(work))
    run = run_state.view(history, time.time(), lambda stages: run_state.lives(work, stages))
    if run is None:
        return []
    took = {each.stage: each.elapsed_s for each in run.stages if each.state == run_state.DONE and each.elapsed_s}
    lines = estimate.compared([StageTime(each.stage, each.estimate_s, "") for each in run.stages], took)
    return ["the last run here, " + lines[0], *lines[1:]] if lines else []


def parse() -> argparse.Namespace:
    parser = parser_for("plan", __doc__)
    add = parser.add_argument
    add("--profile", choices=sorted(PROFILES), help="flash: DeepSeek-V4-Flash as published, nothing downloaded yet")
    add("--source", type=Path, metavar="DIR", help="an upstream checkpoint that is here; its config.json is enough")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="the run's folder; its free space is compared (default: scratch/<profile>, not compared)",
    )
    add("--on", default="", metavar="KIND", help=f"of machine: {', '.join(machines.kinds())} (default: this machine)")
    for name, has in (("gpu-memory-gb", "a GPU"), ("memory-gib", "the machine"), ("disk-gb", "its disk")):
        add(f"--{name}", type=float, metavar="N", help=f"that {has} of that kind has (default: machines.toml's)")
    add("--gpus", type=int, metavar="N", help="GPUs that share the samples (default: 1, or the kind's)")
    add("--samples", type=int, metavar="N", help="calibration samples (default: the profile's)")
    add("--seq-len", type=int, metavar="N", help="tokens in a sample (default: the profile's)")
    add("--recipe", choices=tuple(RECIPES), default=INT4, help="by which it is made (default: %(default)s)")
    add("--price", type=float, metavar="P", help="of an hour of the machine, in any currency; adds the cost")
    for name, does in (
        ("--read-gbps", "the disk reads"),
        ("--write-gbps", "the disk writes"),
        ("--network-gb-s", "the download brings"),
    ):
        add(name, type=float, metavar="GB", help=f"10^9 bytes that {does} a second (default: measured)")
    add("--layer-seconds", type=float, metavar="S", help="compute of a layer on these GPUs (default: from benchmarks)")
    add("--no-measure", dest="measure", action="store_false", help="do not measure the disk below --work")
    add("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args()
    if not (arguments.profile or arguments.source):
        parser.error("one of --profile and --source is needed")
    for name in ("gpus", "samples", "seq_len"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")
    for name in (*KIND, "read_gbps", "write_gbps", "network_gb_s", "layer_seconds"):
        if (value := getattr(arguments, name)) is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is more than 0")
    return arguments


def main() -> None:
    arguments = parse()
    kind = machines.named(arguments.on, {name: getattr(arguments, name) for name in KIND}) if arguments.on else None
    arguments.gpus = arguments.gpus or (kind.gpus if kind else 1)
    price = kind.price if kind else arguments.price
    found, work = plan_of(arguments), arguments.work
    if arguments.json:
        free = requirements.free_bytes(work) if work else None
        on = machines.record(kind, found, arguments.gpus, work) if kind else {}
        print(json.dumps({**run_plan.record(found, price, free), **on}, indent=1))
    else:
        console = table_console()
        print(found.title, *([kind.line] if kind else []), sep="\n")
        console.print(stage_table(found, price))
        print(*conclusions(found, price), sep="\n")
        print("\nwhat the times rest on:", *bases(found, kind), sep="\n")
        if work and not kind and (lines := last_run(work)):
            print("", *lines, sep="\n")
    if kind:
        lines = machines.verdict(kind, found, arguments.gpus, work)
        if not arguments.json:
            print("", *lines, sep="\n")
    elif work:
        requirements.require_room(found.room_bytes, work)
        if not arguments.json:
            print(f"\n{work}: {requirements.free_bytes(work) / GB:,.1f} GB free, enough")


if __name__ == "__main__":
    run_main(main)
