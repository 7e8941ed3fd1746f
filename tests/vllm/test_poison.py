"""That a request which ends what computes it does not end them all. A real haproxy with the router's configuration,
before stand-ins."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from balanced import Answer, Router, router, up, wait_for

from v4forge.serving.haproxy import Limits

pytestmark = pytest.mark.serve

REFUSED_S = 8


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with router(tmp_path_factory.mktemp("poison"), 4, by_prefix=True, limits=Limits(refused_s=REFUSED_S)) as front:
        yield front


@pytest.fixture
def front(started: Router) -> Router:
    """Four replicas that run."""
    for worker in started.workers:
        worker.status = 200
        if worker.killed:
            worker.restart()
    wait_for(lambda: up(started) == 4, 10)
    return started


def noticed(front: Router) -> None:
    """Other requests, by which the router learns which replicas are gone."""
    gone = sum(worker.killed for worker in front.workers)
    wait_for(lambda: front.ask(at_s=time.monotonic()).status == 200 and up(front) == 4 - gone, 10)


def digest(answer: Answer, front: Router) -> str:
    """What a refusal names; it is in the log lines of all that was sent of it."""
    named = answer.lines[0].partition("for a while: ")[2].partition('"')[0]
    assert len(named) == 40 and sum(named in line for line in front.said.splitlines()) >= 2
    return named


def test_one_that_ends_two_before_their_first_byte_reaches_no_third(front: Router) -> None:
    poison = {"kills": "before", "n": 1}
    first, second, third = (front.ask(**poison) for _ in range(3))
    assert (first.status, second.status, third.status) == (502, 422, 422)
    assert sorted(front.seen(**poison)) == [0, 0, 1, 1]  # at most one other, and none twice
    assert second.headers["retry-after"] == str(REFUSED_S) and digest(second, front) == digest(third, front)
    assert front.ask(prompt="innocent").status == 200


def test_one_that_ends_two_in_the_middle_of_their_answers_reaches_no_third(front: Router) -> None:
    poison = {"kills": "after", "stream": True, "tokens": 3, "n": 2}
    for _ in range(2):
        answer = front.ask(**poison)
        assert answer.status == 200 and not answer.whole
        noticed(front)
    assert front.ask(**poison).status == 422
    assert sum(front.seen(**poison)) == 2


def test_one_that_comes_again_before_the_router_knows_reaches_no_fourth(front: Router) -> None:
    poison = {"kills": "after", "stream": True, "tokens": 3, "prompt": "at once"}
    assert [front.ask(**poison).status for _ in range(6)][-2:] == [422, 422]
    assert sum(front.seen(**poison)) <= 3


def test_it_is_refused_for_a_while_only(front: Router) -> None:
    for worker in front.workers:
        worker.status = 500
    assert [front.ask(n=3).status for _ in range(2)] == [500, 422]
    for worker in front.workers:
        worker.status = 200
    assert wait_for(lambda: front.ask(n=3).status == 200, 3 * REFUSED_S) > REFUSED_S / 2


def test_the_same_body_for_something_else_is_another_request(front: Router) -> None:
    for worker in front.workers:
        worker.status = 500
    assert [front.ask(n=4).status for _ in range(2)] == [500, 422]
    for worker in front.workers:
        worker.status = 200
    assert front.ask(to="/v1/chat/completions", n=4).status == 200


def test_what_ran_beside_it_once_is_not_refused(front: Router) -> None:
    beside = [{"first_s": 1, "n": 10 + place} for place in range(8)]
    streams = [{"stream": True, "tokens": 20, "token_s": 0.1, "n": 20 + place} for place in range(8)]
    front.ask_all([*beside, *streams], front.workers[0].kill)
    noticed(front)
    assert {front.ask(**body).status for body in (*beside, *streams)} == {200}


def test_a_prompt_that_everybody_sends_outlives_one_replica(front: Router) -> None:
    common = {"prompt": "are you there?"}
    home = int(front.ask(**common).headers["x-v4forge-replica"])
    front.workers[home].kill()
    wait_for(lambda: front.workers[home].killed, 5)
    noticed(front)
    assert [front.ask(**common).status for _ in range(20)] == [200] * 20


def test_a_replica_that_is_down_besides_takes_the_place_of_the_other(front: Router) -> None:
    """A refused connection is the one retry: what was not sent costs another try all the same."""
    for worker in front.workers[1:]:
        worker.kill()
    wait_for(lambda: all(worker.killed for worker in front.workers[1:]), 5)
    poison = {"kills": "before", "n": 5}
    assert front.ask(**poison).status in (502, 503)
    assert sum(front.seen(**poison)) <= 1


def test_where_there_is_no_other_it_is_not_sent_again(tmp_path: Path) -> None:
    with router(tmp_path, 1) as front:
        front.workers[0].status = 500
        assert [front.ask(n=6).status for _ in range(3)] == [500, 500, 422]
        assert sum(front.seen(n=6)) == 2  # one that has ended its only replica once may come back


def test_the_router_ends_when_it_is_told_to_whatever_it_remembers(tmp_path: Path) -> None:
    with router(tmp_path, 2, by_prefix=True) as front:
        front.ask(kills="after", stream=True, tokens=3)
        front.ask(kills="before")
        end = time.monotonic() + 25  # after 30 s it would, whatever holds it
        while front.process.poll() is None and time.monotonic() < end:
            front.process.send_signal(signal.SIGUSR1)  # haproxy's first process loses one while it still starts
            with suppress(subprocess.TimeoutExpired):
                front.process.wait(1)
        assert front.process.poll() == 0
