"""What the tests with docker share. Without a daemon they fail and say what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from staged import PROBE, Project, build, left

from v4forge.images import base, containers, definitions
from v4forge.images.containers import Engine


@pytest.fixture(scope="session")
def engine() -> Engine:
    return containers.connect()


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> str:
    """A Debian with certificates and without Python: V4FORGE_TEST_BASE, or the one that `make images` makes."""
    return os.environ.get("V4FORGE_TEST_BASE") or base.debian(engine.client)


@pytest.fixture(scope="session")
def make_image(
    engine: Engine, base_image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., str]]:
    made = set()

    def make(lane: str = "cpu", code: str = definitions.code_sha256()) -> str:
        tag = build(engine, base_image, tmp_path_factory.mktemp("context"), lane=lane, code=code)
        made.add(tag)
        return tag

    yield make
    for tag in made:
        engine.client.images.remove(tag, force=True)


@pytest.fixture(scope="session")
def image(make_image: Callable[..., str]) -> str:
    return make_image()


@pytest.fixture
def project(tmp_path: Path, image: str, engine: Engine) -> Iterator[Project]:
    """A project whose containers are all gone in the end."""
    for name in ("scripts", "source"):
        (tmp_path / name).mkdir()
    (tmp_path / "scripts/probe.py").write_text(PROBE)
    yield Project(tmp_path, image)
    assert left(engine, tmp_path) == []
