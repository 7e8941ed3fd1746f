"""One id of a request: in the router's log, at the replica, in the answer. A real haproxy before stand-ins, and a real
vLLM's log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from balanced import Router, router, wait_for
from served import Served

from benchmarks.clients import message

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

UUID = re.compile(r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}")


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with router(tmp_path_factory.mktemp("router"), 1) as made:
        yield made


def sent_on(front: Router) -> list[str]:
    """The ids that the last request had when it reached a replica."""
    return re.findall(r"(?im)^x-request-id: *(.*?)\r?$", front.workers[0].heads[-1])


def ids(front: Router, headers: list[tuple[str, str]]) -> str:
    """The id of a request with these headers, which is the same wherever it is told."""
    answer = httpx.post(f"{front.public}/v1/completions", json={}, headers=headers)
    found = answer.headers.get_list("x-request-id")
    assert answer.status_code == 200 and sent_on(front) == found
    (told,) = found
    wait_for(lambda: front.said.endswith(f" {told}\n"), 5)
    return str(told)


def test_a_request_without_an_id_gets_one_of_its_own(front: Router) -> None:
    first, second = (ids(front, []) for _ in range(2))
    assert first != second and UUID.fullmatch(first) and UUID.fullmatch(second)


@pytest.mark.parametrize("own", ["a", "Order_7.retry-2", "0" * 64, "9f0c2d3e-0000-4000-8000-000000000000"])
def test_a_clients_own_id_is_kept(front: Router, own: str) -> None:
    assert ids(front, [("X-Request-Id", own)]) == own


@pytest.mark.parametrize("own", ["", "a b", "a,b", 'a"b', "0" * 65, "a/../b", "%0a"])
def test_an_id_that_may_not_stand_in_a_log_gives_way(front: Router, own: str) -> None:
    assert UUID.fullmatch(ids(front, [("X-Request-Id", own)]))


def test_of_two_ids_one_is_left(front: Router) -> None:
    assert ids(front, [("X-Request-Id", "one"), ("X-Request-Id", "two")]) == "two"


def test_what_the_router_answers_itself_has_an_id_too(front: Router) -> None:
    answer = httpx.get(f"{front.public}/metrics", headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (404, "mine")
    wait_for(lambda: front.said.endswith(" mine\n"), 5)


def test_vllm_answers_and_logs_a_request_by_its_id(tiny: Served) -> None:
    headers = {"X-Request-Id": "order-7", "Authorization": f"Bearer {tiny.key}"}
    url = f"{tiny.deployment.url}/v1/chat/completions"
    answer = httpx.post(url, json=message("hello", tokens=2), headers=headers, timeout=60)
    assert (answer.status_code, answer.headers["x-request-id"], answer.json()["id"]) == (
        200,
        "order-7",
        "chatcmpl-order-7",
    )
    logs = tiny.folder / "logs"
    replica = Path(logs / f"replica{answer.headers['x-v4forge-replica']}.log")
    wait_for(lambda: "Received request chatcmpl-order-7" in replica.read_text(errors="replace"), 10)
    wait_for(lambda: " order-7\n" in (logs / "router.log").read_text(), 10)
    assert "hello" not in replica.read_text(errors="replace").partition("chatcmpl-order-7")[2].partition("\n")[0]
