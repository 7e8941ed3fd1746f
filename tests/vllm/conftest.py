"""Real servers for the tests: `make serve BACKEND=cpu`, as its program, on the loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import dense
import once
import pytest
from _pytest.nodeid import NodeId
from dense import TINY
from ports import free_ports
from programs import run_module
from served import CHUNK, ROOM, SCHEDULE, Served, calibrated, dense_settings, serve, share_caches


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What ends processes of the deployment that all share runs after the others; in the order of its files. With
    --dist loadgroup all that asks a deployment runs in one worker, where it is started once, and else each file. Its
    start, which the first of them waits for, takes minutes beside other work."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
    for item in items:
        if asks := "start" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(1200))
        if config.getoption("loadgroup", False):
            group = "deployments" if asks else item.nodeid.partition("::")[0]
            # As xdist does for its marker, where pytest 9.2 no longer reads it: pytest-dev/pytest-xdist#1386
            item._id = NodeId.parse(f"{item.nodeid}@{group}")


@pytest.fixture(scope="session")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense.write(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory, vllm_caches: Path) -> Iterator[Callable[..., Served]]:
    """Starts deployments, and stops them in the end."""
    started: list[Path] = []

    def start(artifact: Path, *arguments: str, key: str = "") -> Served:
        folder = share_caches(tmp_path_factory.mktemp("serve"), vllm_caches)
        started.append(folder)
        places = ["--artifact", str(artifact), "--folder", str(folder), "--port", str(free_ports(8))]
        options = [*places, "--backend", "cpu", *arguments]
        done = serve("up", *options, key=key)
        assert done.returncode == 0, done.stdout + done.stderr
        return Served(folder, done.stdout, key, options)

    yield start
    for folder in started:
        serve("stop", "--folder", str(folder))


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of models/tiny with its certificate, made by the pipeline. Of all tests, so that none may write
    there."""

    def make(folder: Path) -> None:
        run_module("verify", "--artifact", calibrated(folder), "--source", TINY)

    return once.in_session(tmp_path_factory, "certified", make) / "artifact"


@pytest.fixture(scope="session")
def tiny(start: Callable[..., Served], tiny_artifact: Path) -> Served:
    """Two replicas of that artifact, which nearly all tests share: with an API key, two drafts a step and none while
    more than eight requests run, room for the tools of a bench, long prompts read in pieces, and requests in the log.
    Nothing of the guards and the probe is left out."""
    settings = ["--set", ROOM, f"max-num-batched-tokens={CHUNK}", f"{SCHEDULE}=[[1,8,2],[9,256,0]]"]
    settings += ["enable-log-requests=true"]
    return start(tiny_artifact, "--drain", "120", "--drafts", "2", *settings, key="sesame")


@pytest.fixture(scope="session")
def pair(start: Callable[..., Served], dense_model: Path) -> Served:
    """Two replicas of the dense model, with an API key. By night only."""
    return start(dense_model, *dense_settings(), key="sesame")
