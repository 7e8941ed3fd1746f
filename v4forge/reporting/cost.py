"""What a million output tokens cost at a price of the machine's hour."""

from __future__ import annotations

from v4forge.reporting.speed_points import Speed, SpeedRow
from v4forge.reporting.tables import NONE, Cell, Figure, Table, columns

MILLION = 1e6
HOUR_S = 3600


def per_million(row: SpeedRow, found: Speed, price: float) -> float:
    """price: of an hour of the machine, of whose GPUs those that served are charged; on a CPU the whole machine."""
    share = found.gpus / found.machine_gpus if found.gpus and found.machine_gpus else 1.0
    return price * share / HOUR_S / row.output_tok_s * MILLION


def table(found: Speed, price: float) -> Table:
    """A row a shape and load, a column a k; the least of a shape is marked."""
    drafts = sorted({row.drafts for row in found.points})
    lines: list[list[Cell]] = []
    for shape in dict.fromkeys(row.shape for row in found.points):
        some = {(row.load, row.drafts): per_million(row, found, price) for row in found.points if row.shape == shape}
        least = min(some.values())
        for load in dict.fromkeys(load for load, _ in some):
            costs = [some.get((load, k)) for k in drafts]
            marks = ["good" if value == least else "" for value in costs]
            cells = [NONE if v is None else Cell(_money(v), mark=mark) for v, mark in zip(costs, marks, strict=True)]
            lines.append([Cell(f"{shape.replace('x', ' in, ')} out, {load}"), *cells])
    whose = (
        f"of whose {found.machine_gpus} GPUs the {found.gpus} that served are charged"
        if found.gpus and found.machine_gpus
        else "all of which is charged"
    )
    note = f"At {price:g} an hour of the machine, {whose}, busy all the time. Green: the least of a shape."
    heads = columns("<", *(f"k={k}" for k in drafts))
    return Table("cost", "Cost per million output tokens", heads, lines, note)


def _money(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.3g}"


def figures(found: Speed, price: float) -> list[Figure]:
    """For the CSV."""
    name = "cost per million output tokens"
    return [Figure(row.key, name, per_million(row, found, price), "price") for row in found.points]
