"""Loaded before the tests' modules, and so before torch: v4forge says how torch's threads wait.

Also what every run of tests has: a seed for all that is drawn.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hints_seen
import hypothesis
import once
import pytest

import v4forge  # noqa: F401
from v4forge import hints

if TYPE_CHECKING:
    from programs import ForkServer

# A shell's background job ignores Ctrl-C, and so would the programs that tests start and stop with it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What repeats a run's random draws: its seed is told in the first lines, and on the workers of a parallel run the same.
SEED = "V4FORGE_TEST_SEED"

# No example has a deadline, which beside other tests is noise. `make soak`: twenty times the examples, where a test
# does not say how many it needs.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    seed = os.environ.setdefault(SEED, str(random.SystemRandom().randrange(10**6)))
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = seed


def pytest_report_header() -> str:
    return f"seed: {SEED}={os.environ[SEED]}"


@pytest.fixture(autouse=True)
def hints_name_what_is_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every hint of a test is judged; on every machine services are systemd's."""
    monkeypatch.setattr(hints, "SYSTEMD", Path("/"))
    with hints_seen.judged() as faults:
        yield
    assert faults == []


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Draws of one test, others in every run, the same with the same seed."""
    return random.Random(f"{os.environ[SEED]} {request.node.name}")


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """A warm process for the tests that kill programs, or start many."""
    import programs

    with programs.fork_server() as server:
        yield server


@pytest.fixture(scope="session")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`layers` and `artifact` of models/tiny, rounded to nearest; of all tests, so that none may write there."""

    def make(folder: Path) -> None:
        from programs import run_here
        from synthetic import TINY

        work, artifact = folder / "layers", folder / "artifact"
        assert run_here("calibrate", "--source", TINY, "--work", work, "--method", "rtn") == 0
        assert run_here("postprocess", "--source", TINY, "--work", work, "--out", artifact) == 0

    return once.in_session(tmp_path_factory, "rounded", make)


@pytest.fixture(scope="session")
def vllm_caches(pytestconfig: pytest.Config) -> Path:
    """Where each vLLM of the tests keeps its caches: a run finds there what an earlier one left, of the same vLLM with
    the same plugins on a processor of the same kind. A start with empty ones is that of a container, by night."""
    from served import LOOK, PLUGINS, SERVE_LOCK, look_at_models

    files = (SERVE_LOCK, LOOK, *sorted(path for folder in PLUGINS for path in folder.rglob("*.py")))
    processor = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model", "flags"))}
    determining = [*(path.read_bytes() for path in files), "\n".join(sorted(processor)).encode()]
    return once.kept(pytestconfig.cache, "vllm-caches", determining, look_at_models)
