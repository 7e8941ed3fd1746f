"""The wait for replicas: what it makes of what their keeper says, without any process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from v4forge.errors import UserError
from v4forge.serving import readiness
from v4forge.serving.deployment import Deployment, Process

RUNS, OTHER = Process("running", "1"), Process("running", "2")
LOG = """x WARNING may give OSError: too many files
ValueError: no such file
x INFO no KeyError: ever
RuntimeError: Engine core initialization failed. See root cause above.
x INFO non-default args: started again"""


class Told:
    """A keeper that says one thing after the other, and the last for ever."""

    def __init__(self, *told: Mapping[str, Process]) -> None:
        self.deployment = Deployment(folder="/f", artifact="/a", runtime="host", backend="cpu", gpus=[[]])
        self.told = list(told)

    def processes(self) -> Mapping[str, Process]:
        return self.told.pop(0) if len(self.told) > 1 else self.told[0]

    def log(self, name: str) -> str:
        return LOG

    def write(self) -> None: ...

    def start(self) -> None: ...

    def follow(self, names: Sequence[str], lines: int) -> None: ...

    def stop(self, say: object, silent: Sequence[str] = ()) -> None: ...


def both(replica: Process, router: Process = RUNS) -> dict[str, Process]:
    return {"replica0": replica, "router": router}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "POLL_S", 0.0)
    monkeypatch.setattr(readiness, "ready", lambda deployment, number: False)


@pytest.mark.parametrize(
    "told",
    [
        [both(RUNS), both(Process("exited", "1"))],
        [both(Process("starting", "")), both(RUNS), both(OTHER)],
        [both(RUNS), both(RUNS), both(Process("starting", "2")), both(OTHER)],
        [both(Process("starting", "1")), both(Process("starting", "2"))],
        [both(Process())],
    ],
    ids=["ended", "ended and runs again", "ended and starts again", "ends again and again", "is not there"],
)
def test_a_replica_that_ends_ends_the_wait_with_its_own_error(
    told: list[dict[str, Process]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        readiness.wait(Told(*told), 60, lambda _done, _doing: None)
    assert error.value.fact == "replica0 has ended: ValueError: no such file"
    assert capsys.readouterr().out.splitlines() == LOG.splitlines()[:-1]  # not what it says when it starts again


def test_a_router_that_ends_is_named() -> None:
    with pytest.raises(UserError, match="router has ended"):
        readiness.wait(Told(both(RUNS, Process("exited", "1"))), 60, lambda _done, _doing: None)


def test_a_wait_has_an_end() -> None:
    with pytest.raises(UserError, match="replica0 is not ready after 0 s"):
        readiness.wait(Told(both(RUNS)), 0, lambda _done, _doing: None)


def test_a_wait_ends_when_all_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(readiness, "ready", lambda deployment, number: next(answers))
    shown: list[tuple[int, str]] = []
    readiness.wait(Told(both(Process("starting")), both(RUNS)), 60, lambda done, doing: shown.append((done, doing)))
    assert shown[0] == (0, "replica0: starting") and shown[-1] == (1, "ready")


def test_a_missing_step_in_a_log_is_no_defect(tmp_path: Path) -> None:
    told = Told(both(RUNS))
    told.log = lambda name: "Loading safetensors checkpoint shards:  50% Completed"  # type: ignore[method-assign]
    assert readiness._step(told, ["replica0"]) == "replica0: Loading safetensors checkpoint shards:  50%"
