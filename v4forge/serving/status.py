"""What runs, from the router and every replica's /metrics: two readings, a moment apart, make a rate."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from v4forge.errors import UserError
from v4forge.serving import client
from v4forge.serving.deployment import Deployment, Process
from v4forge.serving.metrics import Reading

BETWEEN_S = 2.0


@dataclass(frozen=True)
class Row:
    """One replica. What it does not tell is None: `acceptance` without speculation, all of it when it does not answer.

    `kv_usage` and `acceptance` are shares; `tokens_per_s` is of the last seconds, the acceptance since its start.
    """

    name: str
    state: str
    model: str | None = None
    uptime_s: float | None = None
    running: float | None = None
    waiting: float | None = None
    tokens_per_s: float | None = None
    acceptance: float | None = None
    kv_usage: float | None = None

    def json(self) -> dict[str, object]:
        return asdict(self)


def read(deployment: Deployment, number: int) -> Reading | None:
    """A replica's metrics; None when it does not answer."""
    try:
        return client.metrics(deployment.endpoints[number])
    except UserError:
        return None


def rows(deployment: Deployment, processes: Mapping[str, Process], between_s: float = BETWEEN_S) -> list[Row]:
    """One row a replica, in their order."""
    earlier = [read(deployment, number) for number in range(deployment.replicas)]
    time.sleep(between_s)
    found = []
    for number, name in enumerate(deployment.names):
        before, now = earlier[number], read(deployment, number)
        if now is None:
            state = processes.get(name, Process()).state
            found.append(Row(name, "not ready" if state == "running" else state))
            continue
        found.append(
            Row(
                name=name,
                state="ready",
                model=now.model,
                uptime_s=now.uptime_s,
                running=now.running,
                waiting=now.waiting,
                tokens_per_s=now.tokens_per_s(before) if before else None,
                acceptance=now.counts.acceptance,
                kv_usage=now.kv_usage,
            )
        )
    return found
