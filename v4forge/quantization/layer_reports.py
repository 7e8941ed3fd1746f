"""Layer reports as rows: what each layer lost, how many tokens its experts saw, what it took."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v4forge.units import GIB

KINDS = {"w1": "w1 (gate)", "w2": "w2 (down)", "w3": "w3 (up)"}
EXPERTS_LISTED = 10  # of a layer, in the table of experts that saw too few tokens
READING, WRITING = ("read",), ("write", "hidden states")  # spans of a layer that computing does not wait for
ASIDE = (*READING, *WRITING, "fetch")  # what is not computing; fetch: waiting for a shard that was still downloading

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Loss:
    """tr(E H E^T) / tr(W H W^T) of a layer's matrices of one kind, in percent, E = W - Q: means over its experts."""

    rtn: float
    same_scales: float | None  # of round-to-nearest at the scales that GPTQ begins with; None where nobody looked
    gptq: float
    worst: float  # expert, with GPTQ
    better: int  # experts on which GPTQ lost less than round-to-nearest
    better_at_same_scales: int  # and less than round-to-nearest at its own scales
    experts: int

    @property
    def change(self) -> float:
        """Percent by which GPTQ's mean differs from round-to-nearest's."""
        return 100 * (self.gptq / self.rtn - 1) if self.rtn else 0.0


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer: its losses by matrix kind, none where its experts stay as they are, and how many tokens its
    experts saw."""

    layer: int
    attention: str
    losses: dict[str, Loss]
    fewest: int
    median: float
    most: int
    tokens: list[int]  # of each expert
    blended: list[Json]  # experts whose Hessian was blended with the layer's: {"expert", "tokens", "inputs"}
    fallback: list[str]  # matrices on which GPTQ gave way to round-to-nearest

    @property
    def experts(self) -> int:
        return len(self.tokens)

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
                losses={kind: _loss(report["error"][kind]) for kind in KINDS if report["error"] or not _kept(report)},
                fewest=min(tokens),
                median=statistics.median(tokens),
                most=max(tokens),
                tokens=list(tokens),
                blended=list(report["blended"]),
                fallback=[str(matrix) for matrix in report["fallback"]],
            )
        )
    return rows


def _kept(report: Json) -> bool:
    """Whether the recipe left the layer's experts as upstream has them. Earlier reports know of no such layer."""
    return bool(report.get("stored", "int4") != "int4")


def _loss(error: Mapping[str, Sequence[float]]) -> Loss:
    pairs = list(zip(error["rtn"], error["gptq"], strict=True))
    same = error.get("rtn_same_scales", ())
    return Loss(
        rtn=100 * statistics.fmean(rtn for rtn, _ in pairs),
        same_scales=100 * statistics.fmean(same) if same else None,
        gptq=100 * statistics.fmean(gptq for _, gptq in pairs),
        worst=100 * max(gptq for _, gptq in pairs),
        better=sum(gptq < rtn for rtn, gptq in pairs),
        better_at_same_scales=sum(gptq < rtn for rtn, gptq in zip(same, error["gptq"], strict=False)),
        experts=len(pairs),
    )


@dataclass(frozen=True)
class Means:
    """What all matrices of some layers lost, in percent, of round-to-nearest, of it at GPTQ's scales, and of GPTQ."""

    rtn: float
    same_scales: float
    gptq: float

    @property
    def scales_share(self) -> float | None:
        """Percent of what GPTQ saves that its scales save by themselves; None where it saves nothing."""
        saved = self.rtn - self.gptq
        return 100 * (self.rtn - self.same_scales) / saved if saved > 0 else None


def means(losses: Sequence[Loss]) -> Means | None:
    """None where a report does not tell of round-to-nearest at the same scales."""
    same = [loss.same_scales for loss in losses if loss.same_scales is not None]
    if not losses or len(same) < len(losses):
        return None
    rtn, gptq = (statistics.fmean(getattr(loss, method) for loss in losses) for method in ("rtn", "gptq"))
    return Means(rtn, statistics.fmean(same), gptq)


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
        computing = [{what: s for what, s in each.items() if what not in ASIDE} for each in spent]
        most = max(computing, key=lambda each: sum(each.values()))
        rows.append(
            CostRow(
                layer=report["layer"],
                ranks=len(ranks),
                compute_s=sum(most.values()),
                read_s=max(sum(each.get(what, 0.0) for what in READING) for each in spent),
                write_s=max(sum(each.get(what, 0.0) for what in WRITING) for each in spent),
                stages=", ".join(f"{what} {s:.2f}" for what, s in sorted(most.items(), key=lambda item: -item[1])),
                gpu_gib=max(rank["peak_gpu"] for rank in ranks) / GIB,
                host_gib=max(rank["peak_host"] for rank in ranks) / GIB,
            )
        )
    return rows


def mean_losses(report: Json) -> dict[str, float]:
    """Mean relative Hessian-weighted loss over all matrices of a layer, by method."""
    methods = report["error"]["w1"]
    return {m: statistics.fmean(v for by in report["error"].values() for v in by[m]) for m in methods}


def summary(report: Json) -> str:
    """One line about a finished layer."""
    line = f"layer {report['layer']}"
    tokens = sorted(report["tokens"])
    if tokens:
        middle = statistics.median(tokens)
        line += f": tokens per expert {tokens[0]} to {tokens[-1]}, median {middle:g}, {len(report['blended'])} starved"
    if report["error"]:
        lost = mean_losses(report)
        line += f"; lost {lost['gptq']:.3%}, round-to-nearest {lost['rtn']:.3%}"
        if "rtn_same_scales" in lost:
            line += f" ({lost['rtn_same_scales']:.3%} at the same scales)"
    if _kept(report):
        line += "; upstream's own FP4 stays"
    used = report["run"]
    busy = sum(s for what, s in used[0]["seconds"].items() if what not in ASIDE)
    gpu, host = (max(each[kind] for each in used) for kind in ("peak_gpu", "peak_host"))
    memory = f"{gpu / GIB:.1f} GiB GPU, " if gpu else ""
    return f"{line}; {busy:.1f} s, {memory}{host / GIB:.1f} GiB host"
