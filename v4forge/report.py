"""What a finished run says: rows made from the JSON files of its stages, as a terminal table and as one HTML page.

Everything here is a pure function of those files' contents. A key that they lack is a KeyError; the caller knows the
file that it belongs to. Perplexities are per token; shares are kept as percent where they are shown.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.table import Table

TEMPLATES = Path(__file__).parent / "templates"
MODELS = {"source": "source", "rtn": "round-to-nearest", "gptq": "GPTQ"}
KINDS = {"w1": "w1 (gate)", "w2": "w2 (down)", "w3": "w3 (up)"}
EXPERTS_LISTED = 10  # of a layer, in the table of experts that saw too few tokens
LEAVES_LISTED = 40  # of a manifest entry; a larger one is left to the manifest
READING, WRITING = ("read",), ("write", "hidden states")  # spans of a layer that computing does not wait for
SHA256 = re.compile("[0-9a-f]{64}")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class ModelRow:
    """One model on the held-out tokens. Changes are against the source, None for the source itself."""

    name: str
    megabytes: float  # 10^6 bytes of shards
    perplexity: float
    perplexity_change: tuple[float, float] | None  # percent, and its standard error over the sequences
    acceptance: float  # percent of greedy MTP drafts that the main model would choose too
    acceptance_change: float | None  # percentage points


def model_rows(evaluation: Json) -> list[ModelRow]:
    """Source, round-to-nearest and GPTQ, in this order."""
    models = evaluation["models"]
    source = models["source"]
    rows = []
    for key, name in MODELS.items():
        model = models[key]
        change = model["perplexity_change"]["percent"], model["perplexity_change"]["standard_error"]
        points = 100 * (model["mtp_acceptance"] - source["mtp_acceptance"])
        rows.append(
            ModelRow(
                name,
                megabytes=model["bytes"] / 1e6,
                perplexity=model["perplexity"],
                perplexity_change=None if key == "source" else change,
                acceptance=100 * model["mtp_acceptance"],
                acceptance_change=None if key == "source" else points,
            )
        )
    return rows


@dataclass(frozen=True)
class StageRow:
    """A stage's last run."""

    name: str
    elapsed_s: float
    started: str
    command: str


def stage_rows(run: Json) -> list[StageRow]:
    """The stages of run.json in the order in which they began."""
    rows = [StageRow(name, run[name]["elapsed_s"], run[name]["started"], run[name]["command"]) for name in run]
    return sorted(rows, key=lambda row: row.started)


@dataclass(frozen=True)
class Loss:
    """tr(E H E^T) / tr(W H W^T) of a layer's matrices of one kind, in percent, E = W - Q: means over its experts."""

    rtn: float
    gptq: float
    worst: float  # expert, with GPTQ
    better: int  # experts on which GPTQ lost less than round-to-nearest
    experts: int

    @property
    def change(self) -> float:
        """Percent by which GPTQ's mean differs from round-to-nearest's."""
        return 100 * (self.gptq / self.rtn - 1) if self.rtn else 0.0


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer: its losses by matrix kind, and how many tokens its experts saw."""

    layer: int
    attention: str
    losses: dict[str, Loss]
    fewest: int
    median: float
    most: int
    experts: int
    blended: list[Json]  # experts whose Hessian was blended with the layer's: {"expert", "tokens", "inputs"}
    fallback: list[str]  # matrices on which GPTQ gave way to round-to-nearest

    @property
    def blended_shown(self) -> str:
        """Experts with their tokens, the fewest first, cut after EXPERTS_LISTED."""
        order = sorted(self.blended, key=lambda note: (note["tokens"], note["expert"]))
        shown = [f"{note['expert']}\N{NO-BREAK SPACE}({note['tokens']:,})" for note in order[:EXPERTS_LISTED]]
        more = len(order) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def layer_rows(layers: Sequence[Json]) -> list[LayerRow]:
    """One row a layer report, by layer number."""
    rows = []
    for report in sorted(layers, key=lambda report: report["layer"]):
        tokens = report["tokens"]
        rows.append(
            LayerRow(
                layer=report["layer"],
                attention=report["attention"],
                losses={kind: _loss(report["error"][kind]) for kind in KINDS},
                fewest=min(tokens),
                median=statistics.median(tokens),
                most=max(tokens),
                experts=len(tokens),
                blended=list(report["blended"]),
                fallback=[str(matrix) for matrix in report["fallback"]],
            )
        )
    return rows


def _loss(error: Mapping[str, Sequence[float]]) -> Loss:
    pairs = list(zip(error["rtn"], error["gptq"], strict=True))
    return Loss(
        rtn=100 * statistics.fmean(rtn for rtn, _ in pairs),
        gptq=100 * statistics.fmean(gptq for _, gptq in pairs),
        worst=100 * max(gptq for _, gptq in pairs),
        better=sum(gptq < rtn for rtn, gptq in pairs),
        experts=len(pairs),
    )


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """The certificate's checks, failed ones first; `line` is what a run ends with."""

    ok: bool
    line: str
    checks: list[Check]


def verdict(certificate: Json) -> Verdict:
    """A certificate is good when it says so and so does each of its checks; one without checks proves nothing."""
    checks = [Check(check["name"], check["ok"] is True, check["detail"]) for check in certificate["checks"]]
    failed = sum(not check.ok for check in checks)
    ok = certificate["ok"] is True and bool(checks) and not failed
    line = "certificate: ok" if ok else f"certificate: FAILED ({failed} of {len(checks)} checks)"
    return Verdict(ok, line, sorted(checks, key=lambda check: check.ok))


Section = tuple[str, list[tuple[str, str]]]


def provenance(manifest: Json) -> list[Section]:
    """The manifest for people: (title, rows), what has one value first. The losses by layer have a place of their own.

    A listing of files becomes its count, size and one digest; what is too long to read is left to the manifest.
    """
    plain: list[tuple[str, str]] = []
    sections: list[Section] = []
    for key, value in manifest.items():
        rows = [] if key == "layers" else list(_leaves(value, key))
        if len(rows) > LEAVES_LISTED:
            plain.append((key, f"{len(rows):,} values, in manifest.json"))
        elif len(rows) > 1:
            sections.append((key, [(path.removeprefix(f"{key}."), shown) for path, shown in rows]))
        else:
            plain += rows
    return [("", plain), *sections]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(dotted path, text) of every plain value below `value`; a listing of files is one."""
    if isinstance(value, Mapping) and (files := _files(value)):
        yield path, files
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    elif isinstance(value, list) and any(isinstance(inner, Mapping | list) for inner in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{number}")
    elif isinstance(value, list):
        yield path, ", ".join(str(inner) for inner in value) or "none"
    else:
        yield path, "none" if value is None else str(value)


def _files(listing: Json) -> str:
    """A summary of {name: sha256} or {name: {"sha256", "bytes"}}; '' for any other mapping."""
    entries = {name: entry if isinstance(entry, Mapping) else {"sha256": entry} for name, entry in listing.items()}
    digests = {name: str(entry.get("sha256")) for name, entry in entries.items()}
    if not digests or "sha256" in digests or not all(SHA256.fullmatch(digest) for digest in digests.values()):
        return ""
    size = sum(entry.get("bytes", 0) for entry in entries.values())
    total = f", {size / 1e6:,.1f} MB" if size else ""
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return f"{len(digests):,} files{total}; sha256 of their list {hashlib.sha256(lines.encode()).hexdigest()}"


@dataclass(frozen=True)
class CostRow:
    """What one layer took, of the rank with the most."""

    layer: int
    ranks: int
    compute_s: float
    read_s: float  # beside computing, like the writing
    write_s: float
    stages: str  # the computing by stage
    gpu_gib: float  # peak; 0 on a CPU
    host_gib: float  # peak of a process until then


def cost_rows(layers: Sequence[Json]) -> list[CostRow]:
    """One row a layer report, by layer number."""
    rows = []
    for report in sorted(layers, key=lambda report: report["layer"]):
        ranks = report["run"]
        spent = [rank["seconds"] for rank in ranks]
        computing = [{what: s for what, s in each.items() if what not in (*READING, *WRITING)} for each in spent]
        most = max(computing, key=lambda each: sum(each.values()))
        rows.append(
            CostRow(
                layer=report["layer"],
                ranks=len(ranks),
                compute_s=sum(most.values()),
                read_s=max(sum(each.get(what, 0.0) for what in READING) for each in spent),
                write_s=max(sum(each.get(what, 0.0) for what in WRITING) for each in spent),
                stages=", ".join(f"{what} {s:.2f}" for what, s in sorted(most.items(), key=lambda item: -item[1])),
                gpu_gib=max(rank["peak_gpu"] for rank in ranks) / 2**30,
                host_gib=max(rank["peak_host"] for rank in ranks) / 2**30,
            )
        )
    return rows


# A chart is drawn in these units, which are CSS pixels at the width where three, or two wide ones, stand side by side.
CHART_WIDTH, WIDE_WIDTH, CHART_HEIGHT = 300, 470, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 34
X_LABELS = 9
LOG_TICKS = 7
LOG_RATIO = 20  # most to fewest tokens, above which their axis is logarithmic
LOG_ZERO = 0.1  # counts are whole: a decade below one there is room for none


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Chart:
    """Some figures over the layers. Ticks are (position, label); lines are by name."""

    title: str
    width: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: dict[str, list[Point]]


@dataclass(frozen=True)
class Scale:
    """A vertical axis with these ticks, upwards."""

    ticks: list[float]
    logarithmic: bool = False

    def y(self, value: float) -> float:
        """Where a value is drawn."""
        low, high, at = (self._height(v) for v in (self.ticks[0], self.ticks[-1], value))
        return round(TOP + (CHART_HEIGHT - TOP - BOTTOM) * (1 - (at - low) / (high - low)), 1)

    def _height(self, value: float) -> float:
        return math.log10(max(value, LOG_ZERO)) if self.logarithmic else value


def loss_charts(rows: Sequence[LayerRow]) -> list[Chart]:
    """One chart a matrix kind, all on one scale that begins at zero."""
    highest = max((max(loss.rtn, loss.gptq) for row in rows for loss in row.losses.values()), default=0.0)
    scale = Scale(axis(highest))
    charts = []
    for kind, title in KINDS.items():
        lines = {
            method: [(getattr(row.losses[kind], method), f"{getattr(row.losses[kind], method):.3g}%") for row in rows]
            for method in ("rtn", "gptq")
        }
        charts.append(_chart(title, CHART_WIDTH, rows, lines, scale, lambda tick: f"{tick:.6g}%"))
    return charts


def token_charts(rows: Sequence[LayerRow]) -> list[Chart]:
    """Tokens per expert, and how many experts had too few."""
    fewest, most = min(row.fewest for row in rows), max(row.most for row in rows)
    logarithmic = most > LOG_RATIO * fewest
    lines = {
        name: [(getattr(row, name), f"{name} {getattr(row, name):,.0f} tokens") for row in rows]
        for name in ("most", "median", "fewest")
    }
    starved = {"starved": [(len(row.blended), f"{len(row.blended)} of {row.experts} experts") for row in rows]}
    starving = axis(max(5, *(len(row.blended) for row in rows)))
    title = "Tokens per expert, logarithmic" if logarithmic else "Tokens per expert"
    scale = Scale(log_axis(fewest, most), True) if logarithmic else Scale(axis(most))
    return [
        _chart(title, WIDE_WIDTH, rows, lines, scale, _count),
        _chart("Starved experts", WIDE_WIDTH, rows, starved, Scale(starving), _count),
    ]


def _count(tick: float) -> str:
    """A whole number, in thousands or millions where it is large; '' for what is none."""
    if tick != int(tick):
        return ""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if tick >= unit:
            return f"{tick / unit:g}{suffix}"
    return f"{tick:g}"


def _chart(
    title: str,
    width: int,
    rows: Sequence[LayerRow],
    lines: Mapping[str, Sequence[tuple[float, str]]],
    scale: Scale,
    label: Callable[[float], str],
) -> Chart:
    """lines: by name a value and its description for each row; a tick whose label is '' is left out."""

    def x(number: int) -> float:
        return round(LEFT + (width - LEFT - RIGHT) * (number + 0.5) / len(rows), 1)

    every = math.ceil(len(rows) / X_LABELS)
    return Chart(
        title,
        width,
        x_ticks=[(x(i), str(row.layer)) for i, row in enumerate(rows) if i % every == 0],
        y_ticks=[(scale.y(tick), label(tick)) for tick in scale.ticks if label(tick)],
        lines={
            name: [
                Point(x(i), scale.y(value), f"layer {row.layer}, {row.attention}: {said}")
                for i, (row, (value, said)) in enumerate(zip(rows, line, strict=True))
            ]
            for name, line in lines.items()
        },
    )


def axis(highest: float) -> list[float]:
    """Ticks from zero to at least `highest`, at most five steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not highest > 1e-9:  # no loss that a picture could show
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * 5 >= highest * (1 - 1e-9))
    return [float(f"{step * n:.6g}") for n in range(math.ceil(highest / step - 1e-9) + 1)]


def log_axis(fewest: int, most: int) -> list[float]:
    """Ticks around these counts, powers of ten and, unless that were too many, 2 and 5 times them; 0 before all."""
    ticks: list[float] = []
    for factors in ((1, 2, 5), (1,)):
        marks = [0.0, *(f * 10.0**power for power in range(math.ceil(math.log10(most)) + 1) for f in factors)]
        lowest = max(mark for mark in marks if mark <= fewest)
        highest = min(mark for mark in marks if mark >= most)
        ticks = [mark for mark in marks if lowest <= mark <= highest]
        if len(ticks) <= LOG_TICKS:
            break
    return ticks


def models_table(evaluation: Json) -> Table:
    """The table that a run ends with."""
    table = Table(box=box.SIMPLE_HEAD, caption=heldout_line(evaluation), caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("size, MB", "perplexity", "change", "MTP acc.", "points"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in model_rows(evaluation):
        table.add_row(
            row.name,
            f"{row.megabytes:,.1f}",
            f"{row.perplexity:.3f}",
            "" if row.perplexity_change is None else "{:+.2f}±{:.2f}%".format(*row.perplexity_change),
            f"{row.acceptance:.1f}%",
            "" if row.acceptance_change is None else f"{row.acceptance_change:+.2f}",
        )
    return table


def stages_line(rows: Sequence[StageRow]) -> str:
    """Seconds per stage in one line, '' when there are none."""
    if not rows:
        return ""
    total = sum(row.elapsed_s for row in rows)
    return "seconds: " + ", ".join([*(f"{row.name} {row.elapsed_s:.1f}" for row in rows), f"together {total:.1f}"])


def heldout_line(evaluation: Json) -> str:
    heldout = evaluation["heldout"]
    return (
        f"{heldout['tokens']:,} held-out tokens of {heldout['file']}; "
        f"unigram perplexity {evaluation['unigram_perplexity']:.0f}"
    )


def page(evaluation: Json, certificate: Json, layers: Sequence[Json], run: Json, manifest: Json) -> str:
    """The report as one HTML document that needs no other file."""
    return _rendered(
        "report.html.j2",
        **_layers(layers),
        models=model_rows(evaluation),
        heldout=heldout_line(evaluation),
        heldout_sha256=evaluation["heldout"]["sha256"],
        stages=stage_rows(run),
        verdict=verdict(certificate),
        provenance=provenance(manifest),
    )


def calibration_page(layers: Sequence[Json]) -> str:
    """What GPTQ left of one or more layers, as one HTML document that needs no other file; its times are a run's."""
    return _rendered("calibration.html.j2", **_layers(layers), costs=cost_rows(layers))


def _layers(layers: Sequence[Json]) -> dict[str, Any]:
    """What layers.html.j2 shows."""
    rows = layer_rows(layers)
    losses = [loss for row in rows for loss in row.losses.values()]
    return {
        "layers": rows,
        "kinds": KINDS,
        "loss_charts": loss_charts(rows),
        "token_charts": token_charts(rows),
        "chart": {"height": CHART_HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
        "better": sum(loss.better for loss in losses),
        "matrices": sum(loss.experts for loss in losses),
    }


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
