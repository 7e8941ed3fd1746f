"""What answers and times of servers with several numbers of drafts say: medians, ratios, equal tokens; the table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.serve_client import Server


def throughput(server: Server) -> dict[int, float]:
    """Median tokens a second by requests at a time."""
    rows = server.found.get("loads", ())
    counts = sorted({row["concurrency"] for row in rows})
    return {n: median(row["output_tok_s"] for row in rows if row["concurrency"] == n) for n in counts}


def medians(times: dict[str, list[float]], plain: dict[str, list[float]] | None) -> dict[str, Any]:
    """Medians of a server's times, and their ratios to those of the server without drafts."""
    found: dict[str, Any] = {name: median(values) for name, values in times.items()}
    found["token_ms_quartiles"] = quantiles(times["token_ms"], n=4)[::2] if len(times["token_ms"]) > 1 else None
    if plain:
        found |= {f"{name}_ratio": median(times[name]) / median(plain[name]) for name in ("token_ms", "step_ms")}
    return found


def equal_runs(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How much of two servers' answers to the same prompts is equal: whole ones, and tokens before they differ."""
    before = []
    for a, b in zip(first, second, strict=True):
        differing = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        before.append(next(differing, len(a)))
    whole = sum(n == len(a) for n, a in zip(before, first, strict=True))
    return {"answers": len(before), "whole": whole, "share_before_differing": sum(before) / sum(map(len, first))}


def compare(servers: Sequence[Server], like: Sequence[Sequence[int]]) -> None:
    """Medians and ratios; how much of a server's tokens is the plain server's, and that of another run."""
    plain = next((each for each in servers if not each.settings.drafts and not each.failure), None)
    times = plain.found.get("times") if plain else None
    for each in servers:
        if not each.failure:
            tokens = [answer.tokens for answer in each.answers]
            if plain:
                each.found["equal_to_plain"] = equal_runs([answer.tokens for answer in plain.answers], tokens)
            if like:
                shown = [theirs[: len(ours)] for theirs, ours in zip(like, tokens, strict=False)]
                each.found["equal_to_like"] = equal_runs(shown, tokens[: len(shown)])
        if each.found.get("times", {}).get("token_ms"):
            each.found["medians"] = medians(each.found["times"], times)
        each.found["output_tok_s"] = throughput(each)
        if plain:
            base = throughput(plain)
            each.found["output_tok_s_ratio"] = {n: rate / base[n] for n, rate in throughput(each).items() if n in base}


def within(server: Server) -> bool:
    """Whether the server ran to the end and did what our forward expects of it."""
    found = server.found
    return not server.failure and found["agreement"]["within"] and all(r["within"] for r in found.get("acceptance", ()))


def table(servers: Sequence[Server]) -> Table:
    """A row a server."""
    drawn = Table(box=box.SIMPLE_HEAD)
    headings = (
        "k",
        "ready s",
        "GiB",
        "same token",
        "nats off",
        "acceptance rate: server, forward",
        "TPOT, ms",
        "of",
        "tok/s",
    )
    for heading in headings:
        drawn.add_column(heading, justify="right")
    for each in servers:
        found, k = each.found, str(each.settings.drafts)
        if each.failure or "medians" not in found:
            drawn.add_row(k, each.failure or "not measured")
            continue
        rows, times = found.get("acceptance", ()), found["medians"]
        places = ", ".join(f"{percent(row['server'])} {percent(row['forward'])}" for row in rows)
        agreed = found["agreement"]
        drawn.add_row(
            k,
            f"{found['ready_s']:.0f}",
            f"{found['gpu_gib']:.1f}",
            f"{agreed['same']['value']:.1%}",
            f"{agreed['most_likely']['mean']:.3f}",
            places,
            f"{times['token_ms']:.2f}",
            f"{times.get('token_ms_ratio', 1):.2f}",
            ", ".join(f"{rate:.0f}" for rate in throughput(each).values()),
        )
    return drawn


def percent(estimate: dict[str, float | None]) -> str:
    value = estimate["value"]
    return "none" if value is None else f"{value:.1%}"
