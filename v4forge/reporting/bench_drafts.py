"""The drafts bench in the report: acceptance rate and length, by workload and by position.

Pure functions of a result file's content (bench/results.py). A key that it lacks is a KeyError; the caller knows
the file. Shares stay shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from v4forge.bench.published_figures import Value, by_key
from v4forge.bench.standing import Worth
from v4forge.bench.terms import acceptance_length
from v4forge.bench.workloads import TITLES
from v4forge.intervals import Estimate
from v4forge.reporting import svg
from v4forge.reporting.tables import (
    Cell,
    Drawing,
    Figure,
    Found,
    Json,
    Table,
    columns,
    ends,
    estimated,
    number,
    percent,
    points,
)

TITLE = "Acceptance by workload"
SAID = ""
UNKNOWN = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class AcceptanceRow:
    """One workload; shares with 95% intervals. position i: of all drafts, those whose token i was accepted."""

    workload: str
    title: str
    prompts: int
    steps: int
    draft_tokens: int
    accepted: int
    acceptance: Estimate
    by_position: list[Estimate]
    given_earlier: list[Estimate]
    published: Value | None

    @property
    def length(self) -> float:
        return acceptance_length(self.accepted, self.steps)


@dataclass(frozen=True)
class Offline:
    """What `verify --deep` found of the artifact that was served, by a forward pass of our own, without a server."""

    acceptance: Estimate
    given_earlier: list[Estimate]
    differences: dict[str, Estimate]  # workload -> the server's acceptance minus this one
    about: str


@dataclass(frozen=True)
class Drafts:
    """What a result file says."""

    workloads: list[AcceptanceRow]
    offline: Offline | None


def rows(result: Json) -> Drafts:
    """The workloads in the order of TITLES, others after them; the offline figure of the first part that tells."""
    order = [*TITLES, *(key for key in result["parts"] if key not in TITLES)]
    parts = {part["workload"]: part for part in result["parts"].values()}
    workloads = [_row(name, parts[name]) for name in order if name in parts]
    return Drafts(workloads, _offline([part for part in result["parts"].values() if part.get("offline")]))


def _row(workload: str, part: Json) -> AcceptanceRow:
    figure = by_key().get(f"draft/{workload}")
    return AcceptanceRow(
        workload,
        TITLES.get(workload, workload),
        prompts=int(part["prompts"]),
        steps=int(part["drafts"]),
        draft_tokens=int(part["draft_tokens"]),
        accepted=int(part["accepted"]),
        acceptance=_estimate(part["acceptance"]),
        by_position=[_estimate(each) for each in part["by_position"]],
        given_earlier=[_estimate(each) for each in part["given_earlier"]],
        published=figure.original if figure else None,
    )


def _offline(parts: Sequence[Json]) -> Offline | None:
    if not parts:
        return None
    told = parts[0]["offline"]
    return Offline(
        acceptance=_estimate(told["acceptance"]),
        given_earlier=[_estimate(each) for each in told["given_earlier"]],
        differences={part["workload"]: _estimate(part["offline"]["difference"]["acceptance"]) for part in parts},
        about=f"{int(told['tokens']):,} held-out tokens; {told['why']}",
    )


def _estimate(value: Json | None) -> Estimate:
    """An interval of a result file; NaN for what is null."""
    return UNKNOWN if value is None else Estimate.of(value)


def tables(found: Drafts, worth: Worth) -> tuple[list[Table], list[str]]:
    """Of all drafts, and where all earlier ones were accepted; beside the offline figure, or how that is made."""
    offline = found.offline
    places = [f"position {position}" for position in range(1, _longest(found.workloads) + 1)]
    overall, given = [], []
    for row in found.workloads:
        counts = Cell(f"{row.accepted:,}", f"of {row.draft_tokens:,}")
        line = [Cell(row.title), number(row.prompts, 0), counts, percent(row.acceptance), number(row.length)]
        if offline:
            line.append(points(offline.differences.get(row.workload, UNKNOWN)))
        overall.append([*line, *map(percent, _filled(row.by_position, len(places)))])
        given.append([Cell(row.title), *map(percent, _filled(row.given_earlier, len(places)))])
    if offline:
        blank = Cell("")
        held = [Cell("offline", "verify --deep"), blank, blank, percent(offline.acceptance), blank, blank]
        overall.append([*held, *[blank] * len(places)])
        given.append([Cell("offline", "verify --deep"), *map(percent, _filled(offline.given_earlier, len(places)))])
        said = [f"Offline: {offline.about}."]
    else:
        said = ["No offline figure of this artifact: python -m scripts.verify … --deep 8192 makes it."]
    against = ["against offline, points"] if offline else []
    return [
        Table(
            "draft",
            "Acceptance rate, of all draft tokens proposed",
            columns("<", "prompts", "accepted", "rate", "length", *against, *places),
            overall,
            note="With 95% intervals (Wilson's). Position i counts as accepted only with all before it.",
        ),
        Table(
            "draft-given",
            "Acceptance rate, where all earlier positions were accepted",
            columns("<", *places),
            given if len(places) > 1 or offline else [],
        ),
    ], said


def _longest(workloads: Sequence[AcceptanceRow]) -> int:
    return max((len(row.by_position) for row in workloads), default=0)


def _filled(values: Sequence[Estimate], length: int) -> list[Estimate]:
    return [*values[:length], *[UNKNOWN] * (length - len(values))]


def overview(found: Drafts, worth: Worth) -> Cell:
    """The acceptance rate at position 1 at its least and most, and of all positions; the acceptance length."""
    made = [row for row in found.workloads if row.by_position and row.draft_tokens]
    if not made:
        return Cell("no draft was made", mark="dim")
    ordered = sorted(made, key=lambda row: row.by_position[0].value)
    least, most = (f"{100 * row.by_position[0].value:.1f}% ({row.title})" for row in (ordered[0], ordered[-1]))
    k = len(made[0].by_position)
    overall = f"k={k}, of all positions, and acceptance length: " + ", ".join(
        f"{row.title} {100 * row.acceptance.value:.1f}% ({row.length:.2f})" for row in made
    )
    text = f"acceptance rate at position 1: {least}" + (f" to {most}" if len(made) > 1 else "")
    return Cell(text, overall)


def published(found: Drafts) -> dict[str, Found]:
    """At position 1: with k=1, as published, it is the only one."""
    ours = {}
    for row in found.workloads:
        first = row.by_position[0] if row.by_position else row.acceptance
        if not math.isnan(first.value):
            ours[f"draft/{row.workload}"] = Found(100 * first.value, ends(first, ".1f", 100))
    return ours


def figures(found: Drafts) -> list[Figure]:
    """Of every workload, and of verify --deep."""
    made = []
    for row in found.workloads:
        made.append(estimated(row.workload, "acceptance rate", row.acceptance, ""))
        made.append(Figure(row.workload, "acceptance length", row.length, "tokens"))
        for name, values in (("", row.by_position), (", where all earlier were accepted", row.given_earlier)):
            places = enumerate(values, start=1)
            made += [estimated(row.workload, f"acceptance rate at position {i}{name}", each, "") for i, each in places]
    if found.offline:
        made.append(estimated("offline", "acceptance rate", found.offline.acceptance, ""))
    return made


def drawings(found: Drafts, worth: Worth) -> list[Drawing]:
    """Of all drafts, and where all earlier ones were accepted; by workload, a mark a position."""
    of_all = [(row.title, row.by_position) for row in found.workloads]
    given = [(row.title, row.given_earlier) for row in found.workloads if row.given_earlier]
    if found.offline:
        given.append(("offline", found.offline.given_earlier))
    known = [row.published.value if row.published else None for row in found.workloads]
    known = known if worth.published_model else []
    drawn = []
    for name, title, groups, originals, note in (
        ("draft-all", "Acceptance rate by position", of_all, known, "counts only with all before it"),
        ("draft-given", "Where all earlier were accepted", given, [], "is of those whose earlier ones were"),
    ):
        if any(estimates for _, estimates in groups):
            picture = _by_workload(name, title, groups, originals)
            drawn.append(Drawing(name, title, picture, f"95% intervals; position i {note}"))
    return drawn


def _by_workload(
    name: str, title: str, groups: Sequence[tuple[str, Sequence[Estimate]]], originals: Sequence[float | None]
) -> str:
    """originals: what was published of position 1, percent, by group."""
    with svg.drawing() as drawn:
        most = max(len(estimates) for _, estimates in groups)
        about = []
        for at, (group, estimates) in enumerate(groups):
            for position, each in enumerate(estimates):
                if math.isnan(each.value):
                    continue
                x, ink = at + 0.2 * (position - (most - 1) / 2), svg.series(position + 1)
                drawn.bar([x, x], [100 * each.least, 100 * each.most], ink)
                said = f"{group}, position {position + 1}: {100 * each.value:.1f}%"
                if not math.isnan(each.low):
                    said += f" ({100 * each.low:.1f} to {100 * each.high:.1f})"
                drawn.mark(x, 100 * each.value, ink, said)
                about.append(said)
            original = originals[at] if originals else None
            if original is not None:
                x = at - 0.2 * (most - 1) / 2 - 0.17
                drawn.mark(x, original, svg.series(0), f"{group}, published: {original:.2f}%", hollow=True)
        drawn.across(range(len(groups)), [svg.label(group) for group, _ in groups])
        drawn.axes.set_xlim(-0.55, len(groups) - 0.45)
        drawn.upwards(svg.axis(100), lambda tick: f"{tick:g}%")
        entries = [(f"position {position + 1}", svg.series(position + 1), False) for position in range(most)]
        beside = [("published", svg.series(0), True)] if any(o is not None for o in originals) else []
        drawn.legend([*entries, *beside])
        drawn.frame(left=44, right=8, top=30, bottom=42)
        return drawn.svg(name, title, "; ".join(about))
