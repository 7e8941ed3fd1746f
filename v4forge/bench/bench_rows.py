"""Results of the benches as rows: how fast, how many drafts are accepted, how good, which tools were called right.

Pure functions of result files' contents (v4forge/bench/results.py). A key that they lack is a KeyError; the caller knows
the file that it belongs to. Shares stay shares; scores of lm-eval's tasks are percent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from v4forge.bench import published_figures
from v4forge.bench.speed import Comparison, compare, drift_of, stops
from v4forge.bench.statistics import z_test
from v4forge.intervals import Estimate

Json = Mapping[str, Any]

# What the published figures are of: DeepSeek-V4-Flash on H200. GH200 is another machine.
FLASH = {"num_hidden_layers": 43, "hidden_size": 4096, "n_routed_experts": 256}
H200 = re.compile(r"\bH200\b")
# One replica of two GPUs is what was measured there.
PUBLISHED_REPLICA = {"replicas": 1, "tensor_parallel": 2}
WORKLOADS = {"random": "random tokens", "code": "code", "chat": "chat", "prose": "raw prose"}
TOOL_POINTS = 30  # of all scenarios
SMOKE_SIZES = {"quick": 4, "quality": 4, "coding": 2}
REASONS_SHOWN, REASON_SHOWN = 2, 160  # of a scenario that lost points, and characters of them
UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Standing:
    """What a result is worth: `marks` are said wherever its figures are; without any it is a result on what the
    published figures are of."""

    trial: int | None
    model: str  # what is measured, '' where it is Flash
    machine: str  # on what, '' where it is H200
    complete: bool

    @property
    def comparable(self) -> bool:
        """Whether a test against the published figures says something."""
        return self.trial is None and not self.model and not self.machine

    @property
    def published_model(self) -> bool:
        """Whether the figures may stand beside the published ones at all, a trial marked as one."""
        return not self.model and not self.machine

    @property
    def marks(self) -> list[str]:
        marks = []
        if self.model and self.machine:
            marks.append(f"{self.model} on {self.machine}: a test of the bench, not a result")
        elif self.model:
            marks.append(f"{self.model}: a test of the bench, not a result")
        elif self.machine:
            marks.append(f"on {self.machine}, where nothing was published: not comparable")
        if self.trial is not None:
            marks.append(f"a trial of {self.trial}: not a result")
        return marks

    @property
    def short(self) -> str:
        """The marks for a table's cell."""
        where = " on ".join(part for part in (self.model, self.machine) if part)
        trial = f"a trial of {self.trial}" if self.trial is not None else ""
        return "; ".join(part for part in (where, trial) if part)


def standing(result: Json) -> Standing:
    """What a result file's figures are worth."""
    artifact = result["target"].get("artifact") or {}
    size = {name: artifact.get(name) for name in FLASH}
    if size == FLASH:
        model = ""
    elif not all(isinstance(value, int) for value in size.values()):
        model = "a model of unknown size"
    elif int(size["hidden_size"] or 0) < FLASH["hidden_size"] / 4:
        model = "tiny model"
    else:
        model = "another model"
    gpus = result["machine"].get("gpus") or []
    if gpus and all(H200.search(name) for name in gpus) and result["target"].get("backend") != "cpu":
        machine = ""
    else:
        machine = f"{len(gpus)} x {gpus[0]}" if gpus and result["target"].get("backend") != "cpu" else "a CPU"
    return Standing(result.get("trial"), model, machine, result["complete"] is True)


# Speed.


@dataclass(frozen=True)
class SpeedRow:
    """One point: k drafts, one shape, one concurrency. `gain` is against k=0 at the same, None without that."""

    drafts: int
    shape: str  # <input>x<output> tokens
    concurrency: int
    ttft_ms: tuple[float, float]  # median, p99
    tpot_ms: tuple[float, float]
    quartiles_ms: tuple[float, float] | None
    output_tok_s: float
    goodput_request_s: float | None
    slo: Json
    acceptance: float | None
    gain: Comparison | None = None


def speed_rows(result: Json) -> list[SpeedRow]:
    """By shape, concurrency and k; without the points that were measured again to see how far a server drifted."""
    gains = {(gain.drafts, gain.shape, gain.concurrency): gain for gain in _comparisons(result)}
    rows = [_speed_row(part, gains) for part in result["parts"].values() if not part.get("again")]
    return sorted(rows, key=lambda row: (*map(int, row.shape.split("x")), row.concurrency, row.drafts))


def drift(result: Json) -> str:
    """How far the servers changed by themselves; '' where no point was measured again."""
    drafts = sorted({int(part["drafts"]) for part in result["parts"].values()})
    found = [each for k in drafts if (each := drift_of(result["parts"], k))]
    if not found:
        return ""
    time, tokens = (100 * max(abs(each[name]) for each in found) for name in ("tpot", "throughput"))
    again = "A server's first point, measured again in the end, differed by at most"
    return f"{again} {time:.1f}% in time a token, {tokens:.1f}% in tokens a second."


def _comparisons(result: Json) -> list[Comparison]:
    return compare(result["parts"], int(result.get("seed") or 0))


def _speed_row(part: Json, gains: Mapping[tuple[int, str, int], Comparison]) -> SpeedRow:
    tpot, quartiles = part["tpot_ms"], part["tpot_ms"].get("quartiles")
    drafts, concurrency = int(part["drafts"]), int(part["concurrency"])
    shape = f"{int(part['input_tokens'])}x{int(part['output_tokens'])}"
    return SpeedRow(
        drafts=drafts,
        shape=shape,
        concurrency=concurrency,
        ttft_ms=(float(part["ttft_ms"]["median"]), float(part["ttft_ms"]["p99"])),
        tpot_ms=(float(tpot["median"]), float(tpot["p99"])),
        quartiles_ms=(float(quartiles[0]), float(quartiles[1])) if quartiles else None,
        output_tok_s=float(part["output_tok_s"]),
        goodput_request_s=None if part["goodput_request_s"] is None else float(part["goodput_request_s"]),
        slo=part.get("slo") or {},
        acceptance=None if part.get("acceptance") is None else float(part["acceptance"]),
        gain=gains.get((drafts, shape, concurrency)),
    )


def stops_paying(result: Json) -> list[str]:
    """For each shape and k a sentence: at which concurrency speculation stops paying."""
    said = [stop.sentence() for stop in stops(_comparisons(result))]
    rows = speed_rows(result)
    alone = sorted(
        {(row.shape, row.drafts) for row in rows if row.drafts} - {(row.shape, row.drafts) for row in rows if row.gain}
    )
    for shape, k in alone:
        said.append(f"{k} draft{'s' * (k > 1)} a step, {shape}: not known where it stops paying, k=0 was not measured")
    return said


# Drafts.


@dataclass(frozen=True)
class AcceptanceRow:
    """One workload; shares with 95% intervals. position i: of all drafts, those whose token i was accepted."""

    workload: str
    title: str
    prompts: int
    draft_tokens: int
    accepted: int
    acceptance: Estimate
    by_position: list[Estimate]
    given_earlier: list[Estimate]
    published: published.Value | None


def estimate(value: Json | None) -> Estimate:
    """An interval of a result file; NaN for what is null."""
    return UNKNOWN if value is None else Estimate.of(value)


def acceptance_rows(result: Json) -> list[AcceptanceRow]:
    """The workloads in the order of WORKLOADS, others after them."""
    order = [*WORKLOADS, *(key for key in result["parts"] if key not in WORKLOADS)]
    parts = {part["workload"]: part for part in result["parts"].values()}
    rows = []
    for workload in (each for each in order if each in parts):
        part = parts[workload]
        figure = published_figures.by_key().get(f"draft/{workload}")
        rows.append(
            AcceptanceRow(
                workload,
                WORKLOADS.get(workload, workload),
                prompts=int(part["prompts"]),
                draft_tokens=int(part["draft_tokens"]),
                accepted=int(part["accepted"]),
                acceptance=estimate(part["acceptance"]),
                by_position=[estimate(each) for each in part["by_position"]],
                given_earlier=[estimate(each) for each in part["given_earlier"]],
                published=figure.original if figure else None,
            )
        )
    return rows


@dataclass(frozen=True)
class Offline:
    """What `verify --deep` found of the artifact that was served, by a forward pass of our own, without a server."""

    acceptance: Estimate
    given_earlier: list[Estimate]
    differences: dict[str, Estimate]  # workload -> the server's acceptance minus this one
    about: str


def offline(result: Json) -> Offline | None:
    """From the first part that tells; None where none does."""
    parts = [part for part in result["parts"].values() if part.get("offline")]
    if not parts:
        return None
    told = parts[0]["offline"]
    return Offline(
        acceptance=estimate(told["acceptance"]),
        given_earlier=[estimate(each) for each in told["given_earlier"]],
        differences={part["workload"]: estimate(part["offline"]["difference"]["acceptance"]) for part in parts},
        about=f"{int(told['tokens']):,} held-out tokens; {told['why']}",
    )


# Quality.


@dataclass(frozen=True)
class QualityRow:
    """One metric of one task, in percent. delta: ours minus the published, points; None where it would say nothing."""

    task: str
    metric: str
    questions: int
    invalid: int
    value: float
    se: float | None
    figure: published_figures.Figure | None  # that it is compared with
    differs: list[str]  # in what the task was run otherwise than the published one
    delta: float | None = None
    delta_se: float | None = None
    p: float | None = None

    @property
    def title(self) -> str:
        return self.figure.title if self.figure else self.task


def quality_rows(result: Json) -> list[QualityRow]:
    """One row a task and metric; those that were published first, in their order."""
    compared = standing(result).comparable
    rows = []
    for key, part in result["parts"].items():
        task = part.get("task", key)
        for metric, found in part["metrics"].items():
            row = QualityRow(
                task=task,
                metric=metric,
                questions=int(part["questions"]),
                invalid=int(part.get("invalid") or 0),
                value=100 * float(found["value"]),
                se=None if found.get("se") is None else 100 * float(found["se"]),
                figure=published_figures.by_key().get(f"quality/{task}/{metric}"),
                differs=[str(each) for each in part.get("differs") or ()],
            )
            rows.append(_tested(row) if compared else row)
    order = list(published_figures.by_key())
    return sorted(rows, key=lambda row: order.index(row.figure.key) if row.figure else len(order))


def _tested(row: QualityRow) -> QualityRow:
    """The row with its difference from the published figure and a two-sided test of it."""
    if row.figure is None or row.figure.original is None:
        return row
    found = z_test(vars(row), vars(row.figure.original))
    return replace(row, delta=found["delta"], delta_se=found["se"], p=found["p"])


# Tools and conversations.


@dataclass(frozen=True)
class ToolRow:
    """A category of tool-calling scenarios."""

    category: str
    scenarios: list[tuple[str, int, int]]  # name, points, most
    reasons: list[str]  # of points that are missing

    @property
    def score(self) -> int:
        return sum(score for _, score, _ in self.scenarios)

    @property
    def most(self) -> int:
        return sum(most for _, _, most in self.scenarios)


@dataclass(frozen=True)
class SmokeRow:
    """A group of short conversations with known outcomes."""

    group: str
    passed: int
    of: int
    reasons: list[str]


@dataclass(frozen=True)
class Conversations:
    """The tools bench: scenarios by category, conversations by group."""

    tools: list[ToolRow] = field(default_factory=list)
    smoke: list[SmokeRow] = field(default_factory=list)

    @property
    def score(self) -> int:
        return sum(row.score for row in self.tools)

    @property
    def most(self) -> int:
        return sum(row.most for row in self.tools)


def conversations(result: Json) -> Conversations:
    """Categories in the order of the file; groups quick, quality, coding."""
    scenarios: dict[str, list[Json]] = {}
    groups: dict[str, list[tuple[str, Json]]] = {}
    for key, part in result["parts"].items():
        if key.startswith("smoke/"):
            groups.setdefault(part["group"], []).append((key, part))
        else:
            scenarios.setdefault(part["category"], []).append(part)
    names = [*(name for name in SMOKE_SIZES if name in groups), *(name for name in groups if name not in SMOKE_SIZES)]
    return Conversations([_tool_row(*each) for each in scenarios.items()], [_smoke_row(n, groups[n]) for n in names])


def _tool_row(category: str, parts: Iterable[Json]) -> ToolRow:
    points = [(str(part["scenario"]), int(part["score"]), int(part["most"])) for part in parts]
    lost = [part for part in parts if part["score"] < part["most"]]
    return ToolRow(category, points, [f"{part['scenario']}: {_why(part['why'])}" for part in lost])


def _why(reasons: Sequence[str]) -> str:
    """What points were lost for, without the checks that hold; the result file has it all."""
    failed = [reason.removeprefix("pass: fails: ") for reason in reasons if ": holds:" not in reason] or list(reasons)
    shown = "; ".join(failed[:REASONS_SHOWN])
    return shown if len(shown) <= REASON_SHOWN else f"{shown[:REASON_SHOWN]}…"


def _smoke_row(group: str, parts: Sequence[tuple[str, Json]]) -> SmokeRow:
    reasons = []
    for key, part in parts:
        failed = [f"{check['name']}: {check['detail']}" for check in part["checks"] if check["ok"] is not True]
        if part["ok"] is not True:
            reasons.append(f"{key.removeprefix('smoke/')}: {_why(failed or ['failed'])}")
    return SmokeRow(group, sum(part["ok"] is True for _, part in parts), len(parts), reasons)
