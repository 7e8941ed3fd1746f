"""What git says of the checkout, whoever owns it and whatever a hook has left in the environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from v4forge import checkout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "a checkout"
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (["init", "-q", str(root)], ["-C", str(root), *identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *words], check=True)
    return root


def test_a_checkout_of_another_owner_has_its_revision(repository: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 65534, 65534)
    refused = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert (found := checkout.told(root=repository)).revision and not found.why
    (repository / "new").write_text("")
    assert str(checkout.revision(root=repository)).endswith("-dirty")
    assert checkout.names(repository) == ["new"]


def test_another_repository_s_variables_are_not_for_ours(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkout.revision(root=repository)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    assert checkout.revision(root=repository) == before is not None


def test_why_there_is_no_revision_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checkout.told(root=tmp_path)
    assert found.revision is None and "not a git repository" in found.why
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout.told(root=tmp_path).why == "git is not installed"


@pytest.mark.parametrize("name", [".venv", ".venv-serve-cpu", "scratch"])
def test_what_is_built_may_be_a_link_elsewhere(name: str, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    subprocess.run(["git", "init", "-q", root], check=True)
    (root / ".gitignore").write_text((checkout.ROOT / ".gitignore").read_text(encoding="utf-8"))
    (root / name).symlink_to(tmp_path)
    done = checkout.git(root, "status", "--porcelain")
    assert done.stdout == "?? .gitignore\n"
