"""How long a run takes, before it begins: from measured tables, this machine's disk and what is there already.

Every figure says what it rests on. None is a figure that nobody has measured, and what adds up says that it is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4forge.digests import cache_of
from v4forge.files import read_json
from v4forge.pipeline import disk_speed, events, reference_timings
from v4forge.pipeline.disk_speed import Speed
from v4forge.pipeline.stages import FILES, PROFILES, STAGES
from v4forge.units import GB, MB, UNIT_BYTES, duration

if TYPE_CHECKING:
    from v4forge.checkpoint.layout import Config
    from v4forge.pipeline.requirements import Sizes

# The stages at whose end a whole run of the profile is.
GOALS = {"tiny": ("card", "report"), "flash": ("card",)}
ASSUMED_NETWORK_BYTES_S = 100e6  # what unknown networks are shown with


@dataclass(frozen=True)
class StageTime:
    """What a stage takes. seconds: None where nobody knows. basis: what the figure rests on, or why there is none."""

    stage: str
    seconds: float | None
    basis: str
    assumed_s: float | None = None  # with what `basis` assumes, where `seconds` is None


@dataclass(frozen=True)
class Given:
    """What the user knows better: the disk, the network, and the compute of a layer on these GPUs."""

    disk: Speed | None = None
    disk_basis: str = "as given"
    network_bytes_s: float | None = None
    layer_s: float | None = None


def of_run(
    names: Sequence[str],
    values: Mapping[str, Any],
    work: Path,
    gpus: int,
    given: Given = Given(),
) -> list[StageTime]:
    """An estimate a stage, for the runner's settings `values`. Only names and sizes of files are looked at; nothing has
    to be there."""
    known = [name for name in names if name in STAGES]
    there = done(known, values, work)
    ahead = [name for name in known if name not in there]
    if values["profile"] == "tiny":
        found = [_of_tiny(name, values, gpus) for name in ahead]
    else:
        found = _of_layers(ahead, values, work, gpus, given) if ahead else []
    by_name = {name: StageTime(name, 0.0, why) for name, why in there.items()} | {each.stage: each for each in found}
    return [by_name.get(name) or StageTime(name, None, "no stage of the pipeline") for name in names]


def names_of(profile: str) -> list[str]:
    """The stages of a whole run in order: those at its end, and all that they come after."""
    wanted, pending = set[str](), list(GOALS[profile])
    while pending:
        name = pending.pop()
        wanted.add(name)
        pending += STAGES[name].after
    wanted -= {STAGES[name].does_all_of for name in wanted}
    return [name for name in STAGES if name in wanted.difference(GOALS[profile])] + list(GOALS[profile])


def stamped(name: str, values: Mapping[str, Any], work: Path) -> bool:
    """Whether the stage has run to its end here and left its outputs. `make why` says whether they still count."""
    paths = [Path(FILES[key][0].format(**values)) for key in STAGES[name].outputs]
    return (work / ".stamps" / f"{name}.json").is_file() and all(path.exists() for path in paths)


def done(names: Sequence[str], values: Mapping[str, Any], work: Path) -> dict[str, str]:
    """The stages that have nothing to do -> why: stamped, and so are those whose outputs they read."""
    there: dict[str, str] = {}
    for name in names:
        if name == "fetch" and values["source"] != f"{values['work']}/upstream":
            there[name] = f"not needed: the source is {values['source']}"
        elif stamped(name, values, work) and all(each in there for each in STAGES[name].after if each in names):
            there[name] = "done"
    return there


def _of_tiny(name: str, values: Mapping[str, Any], gpus: int) -> StageTime:
    """Measured as a whole; nothing is scaled, since of seconds most are start-up."""
    table = reference_timings.pipeline()
    found = table.get("stages", {}).get(name)
    if not found:
        return StageTime(name, None, "not measured")
    for key in ("samples", "seq_len"):
        if key in STAGES[name].settings and values[key] != table[key]:
            return StageTime(name, None, f"measured only with {table['samples']} x {table['seq_len']} tokens")
    if STAGES[name].parallel and gpus > 1:
        return StageTime(name, None, "measured only as one process")
    if values["source"] != PROFILES["tiny"].source:
        return StageTime(name, None, "measured only with models/tiny")
    machine = table["machine"]
    runs = f"median of {table['runs']} runs" if table["runs"] > 1 else "one run"
    beside = ", beside other work" if table.get("load_before", 0) > machine["cores"] / 2 else ""
    return StageTime(name, found["median_s"], f"{runs} on {machine['cores']} x {machine['cpu']}{beside}")


def disk_of(work: Path, given: Given = Given()) -> tuple[Speed | None, str]:
    """The disk's speed that estimates for a work folder count on, and where it is from."""
    for speed, origin in (
        (given.disk, given.disk_basis),
        (disk_speed.known(work), "measured here"),
        (reference_timings.disk(), "the benchmark machine's: this one's has not been measured"),
    ):
        if speed:
            read, write = speed.read_bytes_s / GB, speed.write_bytes_s / GB
            return speed, f"{read:.1f} GB/s read, {write:.1f} GB/s written, {origin}"
    return None, "unknown"


@dataclass(frozen=True)
class Case:
    """What the estimators of the stages look at."""

    values: Mapping[str, Any]
    work: Path
    gpus: int
    given: Given
    config: Config
    sizes: Sizes
    speed: Speed | None

    @property
    def source(self) -> Path:
        return Path(self.values["source"])


def _of_layers(names: Sequence[str], values: Mapping[str, Any], work: Path, gpus: int, given: Given) -> list[StageTime]:
    from v4forge.pipeline import (
        requirements,  # imports torch, which takes seconds that a run of models/tiny need not spend
    )

    speed, _ = disk_of(work, given)
    config = requirements.config_of(Path(values["source"]))
    case = Case(values, work, gpus, given, config, requirements.sizes_of(config), speed)
    return [OF_STAGE[name](case) if name in OF_STAGE else StageTime(name, None, "not measured") for name in names]


def _fetch(case: Case) -> StageTime:
    from v4forge.pipeline import requirements

    missing = max(0, case.sizes.upstream.total() - requirements.arrived_bytes(case.source))
    speed, basis = case.given.network_bytes_s, "as given"
    if speed is None:
        speed, basis = network_bytes_s(events.read(events.file_of(case.work))), "as in the last fetch here"
    if speed is None:
        shown = ", ".join(f"{duration(missing / s)} at {s / MB:,.0f} MB/s" for s in (ASSUMED_NETWORK_BYTES_S, GB))
        return StageTime(
            "fetch", None, f"{missing / GB:.1f} GB, network unknown: {shown}", missing / ASSUMED_NETWORK_BYTES_S
        )
    rate = f"{speed / MB:,.0f} MB/s ({8 * speed / GB:,.1f} Gbit/s)"  # a network is often called by its bits
    return StageTime("fetch", missing / speed, f"{missing / GB:.1f} GB at {rate}, {basis}")


def network_bytes_s(history: Iterable[Mapping[str, Any]]) -> float | None:
    """How fast the last download was that moved bytes: its rate when it last said one."""
    rates = [
        event["rate"] * UNIT_BYTES[event["unit"]]
        for event in history
        if event["stage"] == "fetch" and event.get("unit") in UNIT_BYTES and event.get("rate")
    ]
    return float(rates[-1]) if rates else None


def _calibrate(case: Case) -> StageTime:
    from v4forge.pipeline import requirements

    tables = reference_timings.layers()
    samples, seq_len = case.values["samples"], case.values["seq_len"]
    missing = requirements.missing_layers(case.config, case.work / "layers")
    if case.speed is None or (
        case.given.layer_s is None and (tables is None or not requirements.has_flash_layers(case.config))
    ):
        return StageTime("calibrate", None, "measured only for layers of DeepSeek-V4-Flash")
    if case.given.layer_s is not None:
        compute = [case.given.layer_s for _ in missing]
        basis = "compute as given"
    else:
        assert tables
        compute = [
            tables.layer_s(requirements.attention_of(case.config, layer), case.gpus, samples, seq_len)
            for layer in missing
        ]
        basis = _gpus_basis(tables, case.gpus, samples, seq_len)
    mean = math.fsum(compute) / len(compute) if compute else 0.0
    speed = case.speed
    time = requirements.layer_time(
        case.config, case.sizes, samples, seq_len, speed.read_bytes_s / GB, speed.write_bytes_s / GB, mean
    )
    slower = "disk" if time.disk_s > time.compute_s else "compute"
    seconds = len(missing) * time.layer_s
    hashed = requirements.layer_bytes(case.sizes.artifact)
    if not _digests_kept(case):
        hashed += case.sizes.upstream.total()
    hashing_s = hashed / speed.read_bytes_s
    text = (
        f"{len(missing)} layers x {time.layer_s:.1f} s ({slower}) = {seconds / 60:.1f} min;"
        f" {hashed / GB:.0f} GB read for digests, {duration(hashing_s)}; {basis}"
    )
    return StageTime("calibrate", seconds + hashing_s, text)


def _digests_kept(case: Case) -> bool:
    """Whether the source's digests are known when calibration begins: fetch keeps those it has verified."""
    if case.values["source"] == f"{case.values['work']}/upstream":
        return True
    kept = read_json(cache_of(case.work))
    return any(Path(path).parent == case.source.absolute() or Path(path).parent == case.source for path in kept)


def _gpus_basis(tables: reference_timings.Layers, gpus: int, samples: int, seq_len: int) -> str:
    known = sorted(tables.by_ranks)
    counts = ", ".join(map(str, known[:-1])) + f" and {known[-1]}"
    how = "measured" if gpus in known else "an extrapolation from" if gpus > known[-1] else "a fit between"
    on = f"{how} {counts}" if gpus not in known else how
    tokens = (
        "" if (samples, seq_len) == tables.tokens else f", scaled from {tables.tokens[0]} x {tables.tokens[1]} tokens"
    )
    return f"{gpus} x {tables.device}: {on}{tokens}"


def _postprocess(case: Case) -> StageTime:
    from v4forge.pipeline import requirements

    if case.speed is None:
        return StageTime("postprocess", None, "the disk's speed is unknown")
    own = case.sizes.artifact.total() - requirements.layer_bytes(case.sizes.artifact)
    read = case.sizes.upstream.total() - requirements.layer_bytes(case.sizes.upstream) + own  # and once for the digests
    seconds = read / case.speed.read_bytes_s + own / case.speed.write_bytes_s
    text = f"layers are linked; {read / GB:.1f} GB read, {own / GB:.1f} GB written; computing left out"
    return StageTime("postprocess", seconds, text)


def _verify(case: Case) -> StageTime:
    found = reference_timings.verify()
    if case.speed is None or found is None:
        return StageTime("verify", None, "not measured")
    size = case.sizes.upstream.total() + case.sizes.artifact.total()
    text = (
        f"{size / GB:.0f} GB at {found.of_disk:.2f} of the disk's speed, as measured with {found.cpus} cores at"
        f" {found.disk_bytes_s / GB:.1f} GB/s"
    )
    return StageTime("verify", size / case.speed.read_bytes_s / found.of_disk, text)


def _card(_case: Case) -> StageTime:
    """The model card is made from reports, which do not grow with the model."""
    found = reference_timings.pipeline().get("stages", {}).get("card")
    if not found:
        return StageTime("card", None, "not measured")
    return StageTime("card", found["median_s"], "measured on models/tiny: it reads reports only")


OF_STAGE: dict[str, Callable[[Case], StageTime]] = {
    "fetch": _fetch,
    "calibrate": _calibrate,
    "postprocess": _postprocess,
    "verify": _verify,
    "card": _card,
}


@dataclass(frozen=True)
class Together:
    """The sum of what is known, where stages that overlap count once, and the stages that are missing in it."""

    seconds: float
    unknown: tuple[str, ...]


def together(seconds: Mapping[str, float | None]) -> Together:
    """What stages take together, by their seconds. A stage that begins on the first files of a download runs beside it:
    of the two the longer one counts."""
    known = {name: value for name, value in seconds.items() if value is not None}
    unknown = tuple(name for name, value in seconds.items() if value is None)
    beside = [name for name in known if STAGES[name].beside]
    streams = next((name for name in known if STAGES[name].streams), None)
    total = math.fsum(known.values())
    if beside and streams:
        total -= min(known[streams], math.fsum(known[name] for name in beside))
    return Together(total, unknown)


def overlapping(names: Iterable[str]) -> tuple[str, str] | None:
    """The download and the stage that runs beside it, where a run has both."""
    names = list(names)
    beside = next((name for name in names if STAGES[name].beside), None)
    streams = next((name for name in names if STAGES[name].streams), None)
    return (beside, streams) if beside and streams else None


def compared(estimates: Sequence[StageTime], actual_seconds: Mapping[str, float]) -> list[str]:
    """Lines that set the estimates against what the stages took; none when none of them ran. A stage that was done,
    and ran again because something had changed, was estimated at nothing: it says nothing about the estimates."""
    ran = [each for each in estimates if each.stage in actual_seconds and each.seconds != 0]
    if not ran:
        return []
    width = max(len(each.stage) for each in ran)
    lines = ["estimate against actual:"]
    for each in ran:
        took = actual_seconds[each.stage]
        guess = "unknown" if each.seconds is None else duration(each.seconds)
        off = f"  {took / each.seconds - 1:+.0%}" if each.seconds else ""
        lines.append(f"  {each.stage:<{width}}  {guess:>12}  {duration(took):>12}{off}")
    return lines
