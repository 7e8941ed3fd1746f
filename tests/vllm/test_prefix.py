"""That a conversation goes where its beginning is cached. A real haproxy with the router's configuration, before
stand-ins."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from balanced import Router, router, up, wait_for

from v4forge.serving.haproxy import BOUND_PERCENT, BOUND_SLACK, PIN

pytestmark = pytest.mark.serve

Form = Callable[[int, int], dict[str, Any]]
SYSTEM = {
    "role": "system",
    "content": 'You are "helpful": \\u0041, C:\\users, 是.\n' + "All of this is shared. " * 3000,
}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with router(tmp_path_factory.mktemp("prefix"), 4, by_prefix=True) as made:
        yield made


def chat(number: int, turn: int, *before: dict[str, Any]) -> dict[str, Any]:
    """The conversation `number` at a turn."""
    messages = [*before, {"role": "user", "content": f"Ma question № {number}: «why?»"}]
    for past in range(turn):
        messages += [{"role": "assistant", "content": f"answer {past}"}, {"role": "user", "content": f"more {past}"}]
    return {"messages": messages, "model": "m", "tokens": 1 + turn}


def in_parts(number: int, turn: int) -> dict[str, Any]:
    """The same with contents that are lists."""
    asked = chat(number, turn, {"role": "system", "content": "shared"})
    for message in asked["messages"]:
        message["content"] = [{"type": "text", "text": message["content"]}]
    return asked


def plain(number: int, turn: int) -> dict[str, Any]:
    return {"prompt": f"{number} " * 600 + "and so on " * turn}


FORMS: dict[str, Form] = {
    "a shared system prompt": lambda number, turn: chat(number, turn, SYSTEM),
    "no system prompt": chat,
    "in parts": in_parts,
    "a prompt": plain,
}


def served_by(front: Router, body: dict[str, Any], ascii_only: bool = True, **headers: str) -> int:
    content = json.dumps(body, ensure_ascii=ascii_only).encode()
    with httpx.Client(verify=False) as client:
        answer = client.post(f"{front.public}/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == 200
    return int(answer.headers[PIN])


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "utf-8"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_conversation_stays_and_others_with_its_system_prompt_go_elsewhere(
    front: Router, form: Form, ascii_only: bool
) -> None:
    homes = [{served_by(front, form(number, turn), ascii_only) for turn in range(3)} for number in range(12)]
    assert all(len(replicas) == 1 for replicas in homes)
    assert len(set.union(*homes)) >= 3


def test_a_session_is_a_conversation_whatever_it_says(front: Router) -> None:
    homes = [
        {served_by(front, chat(turn, 0), **{"X-Session-Id": f"s{number}"}) for turn in range(4)} for number in range(8)
    ]
    assert all(len(replicas) == 1 for replicas in homes) and len(set.union(*homes)) >= 2


def test_what_has_no_beginning_goes_to_the_replica_with_the_fewest(front: Router) -> None:
    assert set(Counter(served_by(front, {"input": "the same"}) for _ in range(12)).values()) == {3}


def test_a_replica_that_goes_takes_only_its_own_conversations_along(front: Router) -> None:
    before = {number: served_by(front, chat(number, 0)) for number in range(24)}
    gone = before[0]
    front.workers[gone].kill()
    wait_for(lambda: front.ask(at_s=time.monotonic()).status == 200 and up(front) == 3, 20)
    after = {number: served_by(front, chat(number, 1)) for number in before}
    assert {number for number in before if before[number] != after[number]} == {
        number for number, home in before.items() if home == gone
    }
    assert all(after[number] == served_by(front, chat(number, 2)) for number in after)  # and stay where they went
    front.workers[gone].restart()
    wait_for(lambda: up(front) == 4, 20)
    assert {number: served_by(front, chat(number, 3)) for number in before} == after  # where their beginnings are now


def test_no_replica_gets_more_than_the_bound_of_one_conversation(front: Router) -> None:
    count = 40
    front.ask(prompt="all ask the same", first_s=0)
    for worker in front.workers:
        worker.seen.clear()
    answers = front.ask_all([{"prompt": "all ask the same", "first_s": 6} for _ in range(count)])
    loads = [len(worker.seen) for worker in front.workers]
    assert {answer.status for answer in answers} == {200} and sum(loads) == count
    assert count / 4 < max(loads) <= count / 4 * BOUND_PERCENT / 100 + BOUND_SLACK + 2


def test_many_conversations_at_a_time_find_their_beginnings(front: Router) -> None:
    """Of 16 at a time most turns go where the turn before them went, and no replica has much more than its share."""
    for worker in front.workers:
        worker.seen.clear()
    homes: dict[int, list[int]] = {}

    def talk(number: int) -> None:
        homes[number] = [served_by(front, chat(100 + number, turn) | {"first_s": 0.1}) for turn in range(8)]

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sum(visited[turn] == visited[turn - 1] for visited in homes.values() for turn in range(1, 8))
    assert found / (16 * 7) > 0.8  # a quarter by chance
    loads = Counter(home for visited in homes.values() for home in visited)
    assert max(loads.values()) <= 1.5 * 16 * 8 / 4
