"""From one artifact to another while requests come: supervisord and a real haproxy, with stand-ins for vLLM."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from balanced import Answer, Router, router, up, wait_for
from keeper_stand_in import steps
from ports import free_ports
from served import ROOT, Served, serve

from benchmarks.clients import Outcome as Answered
from benchmarks.clients import message
from v4forge.errors import UserError
from v4forge.outcomes import FAILED, Outcome
from v4forge.serving import client, launch, preflight, probe, readiness, rolling, settings
from v4forge.serving.deployment import ROLLING, Deployment
from v4forge.serving.haproxy import Limits
from v4forge.serving.launch import Start, Wanted

pytestmark = pytest.mark.serve

VLLM = f"""#!/bin/sh
exec {sys.executable} {ROOT}/tests/support/rolled_stand_in.py "$@"
"""
SESSIONS, CLIENTS = 2, 6


class CutOffError(BaseException):
    """Of a process that is killed: nothing of ours is done about it."""


@dataclass
class Endpoint:
    """A deployment that runs; `probed` is asked of each replica before it is put back, by its number."""

    asked: Wanted
    probed: Callable[[int], list[Outcome]] = lambda _number: []
    deployment: Deployment = field(init=False)

    @property
    def folder(self) -> Path:
        return self.asked.folder

    def artifact(self, name: str, faulty: int | None = None) -> Path:
        """An artifact, with which the start of a replica fails."""
        made = self.folder.parent / name
        made.mkdir(exist_ok=True)
        if faulty is not None:
            (made / "faulty").write_text(str(self.deployment.replica_port(faulty)))
        return made

    def up(self, artifact: Path, *allow: str, **changes: Any) -> Deployment:
        asked = replace(self.asked, artifact=artifact, **changes)
        self.deployment = launch.up(launch.deployment_of(asked), "", Start(timeout_s=60, allow=allow), steps)
        return self.deployment

    def made_of(self) -> list[str]:
        """The artifact of each replica, as it says, and its process, as supervisord says."""
        processes = launch.running_in(self.folder).processes()
        return [
            f"{client.fetch(at, '/health')} {processes[name].run}"
            for at, name in zip(self.deployment.endpoints, self.deployment.names, strict=True)
        ]

    def artifacts(self) -> list[str]:
        return [each.split()[0] for each in self.made_of()]

    @contextmanager
    def asked_on_and_on(self) -> Iterator[list[str]]:
        """Requests come meanwhile, streamed and not, of conversations and not, and one that is always the same -> those
        that were lost."""
        over, lost, ended = threading.Event(), [], [0] * CLIENTS
        url = self.deployment.url

        def ask(number: int) -> None:
            headers = {"X-Session-Id": f"session {number}"} if number < SESSIONS else {}
            while not over.is_set():
                body: dict[str, Any] = {"stream": bool(number % 2), "tokens": 10, "token_s": 0.02}
                if number < CLIENTS - 1:
                    body |= {"prompt": f"{number} {ended[number]}"}
                try:
                    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30)
                except httpx.HTTPError as error:
                    lost.append(repr(error))
                    continue
                whole = answer.text.endswith("data: [DONE]\n\n" if body["stream"] else 'data: {"n": 9}\n\n')
                if answer.status_code != 200 or not whole:
                    lost.append(f"{answer.status_code} {answer.text[-200:]}")
                ended[number] += 1

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield lost
            time.sleep(0.5)  # and a while after
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert min(ended) > 1


def endpoint(work: Path, patch: pytest.MonkeyPatch, replicas: int) -> Endpoint:
    (work / "bin").mkdir()
    (work / "bin/vllm").write_text(VLLM)
    (work / "bin/vllm").chmod(0o755)
    port = free_ports(2 + replicas)
    asked = Wanted(work / "serve", work, backend="cpu", port=port, replicas=replicas, program=str(work / "bin"))
    made = Endpoint(replace(asked, drain_s=20))

    def probed(asked: Sequence[client.Endpoint], *_: object) -> list[Outcome]:
        return [outcome for at in asked for outcome in made.probed(at.replica)]

    for module in (readiness, rolling):
        patch.setattr(module, "POLL_S", 0.1)
    patch.setattr(preflight, "check", lambda *_: None)
    patch.setattr(probe, "probe", probed)
    made.up(made.artifact("first"))
    return made


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with pytest.MonkeyPatch.context() as patch:
        made = endpoint(tmp_path_factory.mktemp("rolling"), patch, 2)
        yield made
        launch.stop(made.folder)


@pytest.fixture
def two(started: Endpoint) -> Endpoint:
    """Two replicas that run, of whatever the test before has left; every probe passes."""
    started.probed = lambda _number: []
    return started


def test_another_artifact_comes_replica_by_replica_and_no_request_is_lost(
    two: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    before = two.made_of()
    beside: list[list[str]] = []

    def probed(_number: int) -> list[Outcome]:
        beside.append(two.artifacts())
        return []

    two.probed = probed
    with two.asked_on_and_on() as lost:
        two.up(two.artifact("second"), overrides={"max-num-seqs": "32"})
    assert lost == []
    assert beside == [["second", "first"], ["second", "second"]]
    assert two.artifacts() == ["second", "second"] and set(two.made_of()).isdisjoint(before)
    said = capsys.readouterr().out
    assert "still has" not in said  # nobody kept on asking the one that was to finish
    assert said.splitlines()[-1].startswith(f"ready: {two.deployment.url}")
    assert not (two.folder / ROLLING).exists()
    assert Deployment.load(two.folder) == two.deployment and two.deployment.limits.running == 32


def test_the_same_command_twice_changes_nothing(two: Endpoint) -> None:
    two.up(two.artifact("same"))
    before = two.made_of()
    two.up(two.artifact("same"))
    two.up(two.artifact("same"), overrides={"max-num-seqs": "64"})  # what it is anyway
    assert two.made_of() == before


def test_another_limit_is_the_routers_alone(two: Endpoint) -> None:
    two.up(two.artifact("same"))
    before = two.made_of()
    with two.asked_on_and_on() as lost:
        two.up(two.artifact("same"), waiting=7)
    assert lost == [] and two.made_of() == before
    kept = Deployment.load(two.folder)
    assert kept and kept.limits.waiting == 7


@pytest.mark.parametrize("fault", ["start", "probe"])
def test_where_one_fails_all_are_as_before_and_no_request_is_lost(two: Endpoint, fault: str) -> None:
    kept = two.up(two.artifact("good"))
    bad = two.artifact(f"bad {fault}", faulty=1 if fault == "start" else None)
    failed = [Outcome("replica 1: prompts", FAILED, "NaN in the model")]
    two.probed = lambda number: failed if fault == "probe" and number == 1 and two.artifacts()[1] == "bad" else []
    why = {
        "start": "replica1 has ended: RuntimeError: a tensor is missing",
        "probe": "the probe failed: replica 1: prom",
    }
    with two.asked_on_and_on() as lost, pytest.raises(UserError, match=f"{why[fault]}.*; all replicas are as before"):
        two.up(bad)
    assert lost == []
    assert two.artifacts() == ["good", "good"] and Deployment.load(two.folder) == kept
    assert not (two.folder / ROLLING).exists()


@pytest.mark.parametrize(("passed", "command"), [([], "old"), ([0], "new"), ([0], "old")])
def test_what_was_cut_off_goes_on_with_the_same_command_or_back_with_the_one_of_before(
    two: Endpoint, passed: list[int], command: str
) -> None:
    def cut_off(number: int) -> list[Outcome]:
        if number == len(passed):
            raise CutOffError
        return []

    two.up(two.artifact("old"))
    two.probed = cut_off
    with pytest.raises(CutOffError):
        two.up(two.artifact("new"))
    assert json.loads((two.folder / ROLLING).read_text())["passed"] == passed
    with pytest.raises(UserError, match="a change to other replicas was cut off"):
        two.up(two.artifact("third"))
    two.probed = lambda _number: []
    two.up(two.artifact(command))
    assert two.artifacts() == [command, command] and not (two.folder / ROLLING).exists()


def test_the_only_replica_is_replaced_where_a_cut_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = endpoint(tmp_path, monkeypatch, 1)
    try:
        with pytest.raises(UserError, match="without replica0 nothing would answer until it is back") as error:
            one.up(one.artifact("second"))
        assert error.value.hint.startswith("make serve ALLOW=cut") and one.artifacts() == ["first"]
        one.up(one.artifact("second"), "cut")
        assert one.artifacts() == ["second"]
        with pytest.raises(UserError, match="other replicas run already, with another drain_s"):
            one.up(one.artifact("second"), "cut", drain_s=7)
    finally:
        launch.stop(one.folder)


def noticed(front: Router, number: int) -> bool:
    """Whether the router knows that a worker is gone."""
    return front.ask(at=front.admin, headers={client.PIN: str(number)}).status == 200 and up(front) == 1


def test_a_request_that_comes_again_has_ended_no_replica_that_was_taken_out(tmp_path: Path) -> None:
    with router(tmp_path, 2) as front:
        for _ in range(3):
            answered = front.ask(prompt="how are you")
            assert answered.status == 200
            number = int(answered.headers[client.PIN.lower()])
            front.weigh(number, 0)
            front.workers[number].kill()
            wait_for(partial(noticed, front, number), 10)
            again = front.ask(prompt="how are you")
            assert (again.status, again.headers[client.PIN.lower()]) == (200, str(1 - number))
            front.workers[number].restart()
            front.weigh(number, 1)
            wait_for(lambda: up(front) == 2, 10)


def test_what_one_that_was_taken_out_finishes_takes_no_room_of_the_others(tmp_path: Path) -> None:
    with router(tmp_path, 2, limits=Limits(running=1, waiting=1)) as front:
        bodies: list[dict[str, Any]] = [{"prompt": str(number), "first_s": 3} for number in range(4)]
        more: list[Answer] = []

        def take_out() -> None:
            front.weigh(0, 0)
            more.extend(front.ask(prompt=str(number)) for number in (4, 5))
            front.weigh(0, 1)

        assert all(answer.status == 200 for answer in front.ask_all(bodies[:2], take_out))
        assert [answer.status for answer in more] == [200, 200]
        assert {answer.headers[client.PIN.lower()] for answer in more} == {"1"}


@pytest.mark.soak
@pytest.mark.last
@pytest.mark.timeout(900)
def test_two_of_a_real_vllm_get_another_number_of_drafts_and_no_request_is_lost(tiny: Served) -> None:
    deployment, over = tiny.deployment, threading.Event()
    answered: list[Answered] = []

    def ask() -> None:
        while not over.is_set():
            answered.extend(tiny.ask_all([message(f"{len(answered)} {n}", 24, stream=bool(n % 2)) for n in range(4)]))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        named = {**deployment.overrides, settings.DRAFTS: "1", settings.SCHEDULE: "[[1,8,1],[9,256,0]]"}
        words = ["--artifact", deployment.artifact, "--folder", str(tiny.folder), "--port", str(deployment.port)]
        words += ["--backend", "cpu", "--drain", str(deployment.drain_s), "--set"]
        done = serve("up", *words, *(f"{name}={value}" for name, value in named.items()), key=tiny.key)
    finally:
        over.set()
        asking.join()
    assert done.returncode == 0, done.stdout + done.stderr
    assert tiny.deployment.serving.drafts == 1 and "k=1" in done.stdout.splitlines()[-1]
    assert [each for each in answered if not each.whole] == []
    assert {each.replica for each in answered} == {"0", "1"}
