"""Spans of a run as a timeline: how long each lane was busy, and a picture."""

from __future__ import annotations

import math

from v4forge.profiling import Span


def busy(spans: list[Span]) -> float:
    """Seconds in which at least one of the spans runs."""
    total, end = 0.0, -math.inf
    for span in sorted(spans, key=lambda s: s.start_s):
        total += max(0.0, span.end_s - max(span.start_s, end))
        end = max(end, span.end_s)
    return total


def timeline(spans: list[Span], first: int) -> dict[str, float]:
    """Wall time from layer `first` on, and how long each lane was busy in it."""
    own = [s for s in spans if s.layer >= first]
    begin = min(s.start_s for s in own if s.lane == "compute")
    end = max(s.end_s for s in own)
    late = [Span(s.layer, s.what, s.lane, max(s.start_s, begin), s.end_s, s.bytes) for s in own if s.end_s > begin]
    lanes = {lane: busy([s for s in late if s.lane == lane]) for lane in ("compute", "read", "write")}
    disk = busy([s for s in late if s.lane != "compute"])
    limit = max(lanes["compute"], disk)
    return {
        "wall_s": end - begin,
        **{f"{k}_s": v for k, v in lanes.items()},
        "disk_s": disk,
        "ratio": (end - begin) / limit,
    }


COLORS = {
    "read": "#4c78a8",
    "decode": "#9ecae9",
    "forward 1": "#54a24b",
    "Hessian": "#f58518",
    "scales": "#ffbf79",
    "factorize": "#e45756",
    "sweep": "#b279a2",
    "refit": "#ff9da6",
    "errors": "#d6a5c9",
    "pack": "#9d755d",
    "forward 2": "#88d27a",
    "write": "#72b7b2",
    "hidden states": "#439894",
    "sort": "#bab0ac",
}


def drawn(spans: list[Span]) -> str:
    """The timeline as SVG: a lane for the GPU, one for reading, one for writing."""
    lanes = ("compute", "read", "write")
    begin, end = min(s.start_s for s in spans), max(s.end_s for s in spans)
    width, left, height = 1100, 70, 44
    scale = (width - left - 10) / (end - begin)
    body = []
    for row, lane in enumerate(lanes):
        y = 24 + row * height
        body.append(f'<text x="4" y="{y + 20}">{lane}</text>')
        for s in sorted((s for s in spans if s.lane == lane), key=lambda s: s.start_s):
            x, w = left + (s.start_s - begin) * scale, max(0.3, (s.end_s - s.start_s) * scale)
            label = f"layer {s.layer}: {s.what}, {s.end_s - s.start_s:.3f} s"
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="30" fill="{COLORS.get(s.what, "#ccc")}">'
                f"<title>{label}</title></rect>"
            )
    for layer in sorted({s.layer for s in spans if s.lane == "compute"}):
        x = left + (min(s.start_s for s in spans if s.layer == layer and s.lane == "compute") - begin) * scale
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="156" stroke="#333"/>')
        body.append(f'<text x="{x + 3:.1f}" y="16">layer {layer}</text>')
    for second in range(0, math.ceil(end - begin) + 1, 2):
        body.append(f'<text x="{left + second * scale:.1f}" y="172">{second} s</text>')
    for i, (what, color) in enumerate(COLORS.items()):
        x, y = left + (i % 7) * 140, 188 + i // 7 * 18
        body.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{color}"/>')
        body.append(f'<text x="{x + 16}" y="{y + 10}">{what}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 230" font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<rect width="{width}" height="230" fill="white"/>', *body, "</svg>\n"])
