"""v4forge.digests.Digests: what is known of a file is not read again, whoever of several processes has found it out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from v4forge import digests
from v4forge.digests import Digests


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read."""
    found: list[Path] = []
    sha256 = digests.file_sha256
    monkeypatch.setattr(digests, "file_sha256", lambda path: found.append(path) or sha256(path))
    return found


def made(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_two_processes_add_to_one_cache(tmp_path: Path, hashed: list[Path]) -> None:
    one, other = made(tmp_path / "one", b"1"), made(tmp_path / "other", b"2")
    first, second = Digests(tmp_path / "cache.json"), Digests(tmp_path / "cache.json")
    first.of([one])
    second.of([other])
    first.save()
    second.save()
    assert sorted(json.loads((tmp_path / "cache.json").read_text())) == sorted([str(one), str(other)])
    assert set(Digests(tmp_path / "cache.json").of([one, other])) == {one, other}
    assert hashed == [one, other]


def test_what_another_process_has_found_out_since_is_not_read_again(tmp_path: Path, hashed: list[Path]) -> None:
    path = made(tmp_path / "file", b"1")
    early, late = Digests(tmp_path / "cache.json"), Digests(tmp_path / "cache.json")
    late.learn(path, hashlib.sha256(b"1").hexdigest())
    assert early.known(path) is None
    late.save()
    assert early.of([path])[path] == hashlib.sha256(b"1").hexdigest()
    assert early.known(path) is not None and hashed == []


def test_a_learnt_digest_is_of_the_file_as_it_was(tmp_path: Path, hashed: list[Path]) -> None:
    path, digests = made(tmp_path / "file", b"1"), Digests(tmp_path / "cache.json")
    digests.learn(path, "as learnt")
    assert digests.of([path])[path] == "as learnt"
    made(path, b"changed")
    assert digests.known(path) is None
    assert digests.of([path])[path] == hashlib.sha256(b"changed").hexdigest()
    assert digests.known(tmp_path / "none") is None


def test_files_that_are_gone_leave_the_cache(tmp_path: Path) -> None:
    path, digests = made(tmp_path / "file", b"1"), Digests(tmp_path / "cache.json")
    digests.of([path])
    digests.save()
    path.unlink()
    digests.of([made(tmp_path / "new", b"2")])
    digests.save()
    assert list(json.loads((tmp_path / "cache.json").read_text())) == [str(tmp_path / "new")]
