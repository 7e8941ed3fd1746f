"""An endpoint that holds: two real vLLMs behind the router, a crowd that leaves at random, one fault after the other.

`make ci` has a stall and the end of an engine; `make soak` a quarter of an hour, with a request that ends what computes
it, and with an upgrade and the way back.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from crowd import Crowd, gather
from served import POISON, Served, wait_until

from benchmarks.clients import kill, message, processes
from v4forge.serving import client

pytestmark = [pytest.mark.serve, pytest.mark.last, pytest.mark.timeout(1800)]

STALL_S = 15.0
FINISHED = "vllm:request_success_total"


def finished(tiny: Served) -> dict[str, float]:
    """Requests that the replicas have ended since they started, by why."""
    found: dict[str, float] = {}
    for endpoint in tiny.deployment.endpoints:
        for line in client.fetch(endpoint, "/metrics").splitlines():
            if line.startswith(FINISHED):
                reason = line.partition('finished_reason="')[2].partition('"')[0]
                found[reason] = found.get(reason, 0) + float(line.rsplit(" ", 1)[1])
    return found


def stall(tiny: Served, replica: int) -> None:
    """Stops all processes of a replica for a while, as a machine that swaps does."""
    pids = list(processes(tiny.deployment.replica_port(replica)))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(STALL_S)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def engine(tiny: Served, replica: int) -> list[int]:
    found = processes(tiny.deployment.replica_port(replica))
    return [pid for pid, words in found.items() if "EngineCore" in words]


@contextmanager
def replaced(tiny: Served, *replicas: int) -> Iterator[None]:
    """Around what ends replicas: others have taken their places, and are ready."""
    before = {replica: set(processes(tiny.deployment.replica_port(replica))) for replica in replicas}
    yield
    wait_until(lambda: tiny.program("status", "--json").returncode == 0, 300)
    for replica, pids in before.items():
        assert pids.isdisjoint(processes(tiny.deployment.replica_port(replica)))


def ask(tiny: Served, seed: str, clients: int, seconds: float, *faults: Callable[[], None]) -> Crowd:
    """A crowd beside which the faults come, one after the other."""

    def meanwhile() -> None:
        time.sleep(2)
        for fault in faults:
            fault()

    return gather(
        tiny.deployment.url, tiny.key, clients, seconds, f"{os.environ['V4FORGE_TEST_SEED']} {seed}", meanwhile
    )


def held(tiny: Served, seed: str, clients: int, seconds: float, *faults: Callable[[], None]) -> None:
    """A crowd whom every answer reaches, in spite of faults by which no replica ends; and nothing is computed for who
    has left."""
    before = finished(tiny)
    crowd = ask(tiny, seed, clients, seconds, *faults)
    wait_until(lambda: tiny.computing == 0, 2)
    assert (crowd.cut, crowd.lost) == ([], [])
    ended = {reason: count - before.get(reason, 0) for reason, count in finished(tiny).items()}
    assert crowd.left > len(crowd.whole) / 10
    # Who leaves as the answer ends may have been too late, who leaves at once is never seen by a replica.
    assert 0 <= ended["length"] - len(crowd.whole) <= crowd.left / 4
    assert ended["length"] + ended["abort"] <= len(crowd.whole) + crowd.left


def survived(
    tiny: Served,
    seed: str,
    clients: int,
    seconds: float,
    ends: tuple[int, ...],
    fault: Callable[[], None],
    beside: tuple[int, ...] = (),
) -> None:
    """A crowd beside which these replicas end: no answer is lost that had not begun to come, but for one of a status
    that is told who ran `beside` the cause at every replica; and they come back."""
    with replaced(tiny, *ends):
        crowd = ask(tiny, seed, clients, seconds, fault)
    assert [(request, outcome) for request, outcome in crowd.lost if outcome.status not in beside] == []
    assert len(crowd.lost) < clients
    assert {outcome.replica for outcome in crowd.cut} <= {str(replica) for replica in ends}
    assert crowd.whole
    assert tiny.computing == 0


def test_a_stall_and_the_end_of_an_engine_cost_nobody_an_answer_that_had_not_begun(tiny: Served) -> None:
    held(tiny, "stall", 8, 18, lambda: stall(tiny, 0))
    survived(tiny, "end", 16, 6, (1,), lambda: kill(engine(tiny, 1)))


@pytest.mark.soak
def test_it_holds_for_seven_minutes(tiny: Served) -> None:
    for turn in range(2):
        held(tiny, f"steady {turn}", 32, 60)
        held(tiny, f"stall {turn}", 32, 60, lambda: stall(tiny, 0))
        survived(tiny, f"end {turn}", 32, 90, (1,), lambda: kill(engine(tiny, 1)))


@pytest.mark.soak
@pytest.mark.parametrize("options", [("--drafts", "3"), ()], ids=["there", "back"])
def test_an_upgrade_costs_nobody_an_answer(tiny: Served, options: tuple[str, ...]) -> None:
    def upgrade() -> None:
        done = tiny.up(*options)
        assert done.returncode == 0, done.stdout + done.stderr

    before = tiny.deployment.content
    crowd = ask(tiny, f"upgrade {options}", 32, 150, upgrade)
    assert (crowd.cut, crowd.lost) == ([], []) and crowd.whole
    assert tiny.deployment.content != before and tiny.computing == 0


@pytest.mark.soak
def test_a_request_that_ends_both_replicas_is_refused_and_they_come_back(tiny: Served) -> None:
    """Who ran beside it at both is told so, as it is. All others get their answers when the first is back."""
    poison = message("what no engine survives", 8, seed=POISON)

    def ask_poison() -> None:
        assert tiny.ask(poison).status in (500, 502)
        wait_until(lambda: tiny.program("status", "--json").returncode == 0, 300)
        again = tiny.ask(poison)
        assert again.status == 422 and "has ended two replicas" in again.body["error"]["message"]

    survived(tiny, "poison", 32, 120, (0, 1), ask_poison, beside=(500, 502))
    held(tiny, "afterwards", 32, 60)
