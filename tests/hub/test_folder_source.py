"""make fetch from folders, without a network: what hf downloads, what its cache holds, and any folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fetched import (
    REPO,
    assert_same,
    error,
    fetched,
    said,
    serving_upstream,
    shards,
    write_upstream,
)
from hub_stand_in import MAIN, Hub
from huggingface_hub import constants, hf_hub_download, snapshot_download

from v4forge import files
from v4forge.checkpoint import incoming
from v4forge.hub import fetch


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def served(upstream: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving_upstream(upstream, monkeypatch, tmp_path) as hub:
        yield hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def downloaded(served: Hub, tmp_path: Path) -> Path:
    """What `hf download --local-dir` leaves."""
    folder = tmp_path / "downloaded"
    snapshot_download(REPO, revision=MAIN, local_dir=folder, endpoint=served.url, token=False)
    return folder


@pytest.fixture
def snapshot(served: Hub, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the hub's cache holds of a repository."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for path in upstream.rglob("*.*"):
        name = path.relative_to(upstream).as_posix()
        hf_hub_download(REPO, name, revision=MAIN, cache_dir=tmp_path / "hub", endpoint=served.url, token=False)
    return tmp_path / "hub" / "models--some--model"


@pytest.fixture(autouse=True)
def without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of huggingface_hub's own downloads, which make the folders of these tests."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def test_a_download_of_hf_is_linked_and_checked(
    downloaded: Path, upstream: Path, tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (downloaded / "my notes.txt").write_text("not of the hub")
    out = tmp_path / "upstream"
    assert fetched(out, "--from", downloaded) == 0
    assert_same(out, upstream)
    assert all((out / name).samefile(downloaded / name) for name in shards(upstream))
    listing = incoming.listing(out)
    assert listing is not None and (listing.repo, listing.revision) == (REPO, MAIN)
    assert "each with the hub's hash" in said(capsys)


@pytest.mark.parametrize("where", ["", f"snapshots/{MAIN}"])
def test_a_snapshot_of_the_cache_is_linked_and_checked(
    snapshot: Path, upstream: Path, tmp_path: Path, no_network: None, where: str
) -> None:
    out = tmp_path / "upstream"
    assert fetched(out, "--from", snapshot / where) == 0
    assert {path.name for path in out.glob("*.*")} - {".fetch"} == {path.name for path in upstream.glob("*.*")}
    for name in shards(upstream):
        assert not (out / name).is_symlink() and (out / name).read_bytes() == (upstream / name).read_bytes()
    listing = incoming.listing(out)
    assert listing is not None and (listing.repo, listing.revision) == (REPO, MAIN)


def test_of_a_plain_folder_only_the_structure_is_checked_and_that_is_said(
    upstream: Path, tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "upstream"
    assert fetched(out, "--from", upstream) == 0
    assert_same(out, upstream)
    assert "no hashes of the hub are known, only the structure is checked" in said(capsys)
    listing = incoming.listing(out)
    assert listing is not None and (listing.repo, listing.revision) == (None, None)
    assert fetched(out, "--from", upstream) == 0


def test_on_another_file_system_files_are_copied(
    upstream: Path, tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(files.os, "link", refused)
    out = tmp_path / "upstream"
    assert fetched(out, "--from", upstream) == 0
    assert_same(out, upstream)
    assert not any((out / name).samefile(upstream / name) for name in shards(upstream))
    before = (out / shards(upstream)[0]).stat().st_ino
    assert fetched(out, "--from", upstream) == 0
    assert (out / shards(upstream)[0]).stat().st_ino == before


def test_where_nothing_can_be_linked_the_space_of_copies_is_asked_for(
    upstream: Path,
    tmp_path: Path,
    no_network: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))  # as across the mounts of a container

    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 0))
    assert fetched(tmp_path / "linked", "--from", upstream) == 0
    monkeypatch.setattr(fetch.os, "link", refused)
    assert fetched(tmp_path / "upstream", "--from", upstream) == 1
    assert "GB free, the checkpoint takes" in error(capsys)


@pytest.mark.parametrize("form", ["downloaded", "snapshot"])
def test_a_wrong_shard_of_a_folder_is_named(
    request: pytest.FixtureRequest,
    form: str,
    upstream: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = request.getfixturevalue(form)
    folder = folder / "snapshots" / MAIN if form == "snapshot" else folder
    name = shards(upstream)[1]
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).resolve().write_bytes(content)
    out = tmp_path / "upstream"
    assert fetched(out, "--from", folder) == 1
    printed = capsys.readouterr().err
    assert f"error: {folder / name} is damaged: sha256 " in printed
    where = f"--cache-dir {tmp_path / 'hub'}" if form == "snapshot" else f"--local-dir {folder}"
    assert f"hint: hf download {REPO} {name} --revision {MAIN} --force-download {where}\n" in printed
    assert not (out / name).exists()


def test_a_truncated_shard_of_a_plain_folder_is_refused(
    upstream: Path, tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = tmp_path / "plain", shards(upstream)[1]
    shutil.copytree(upstream, folder)
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    assert fetched(tmp_path / "upstream", "--from", folder) == 1
    assert f"{name} of {folder} is not a safetensors file" in error(capsys)


def test_a_folder_without_one_of_its_shards_is_refused(
    upstream: Path, tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = tmp_path / "plain", shards(upstream)[1]
    shutil.copytree(upstream, folder)
    (folder / name).unlink()
    assert fetched(tmp_path / "upstream", "--from", folder) == 1
    assert error(capsys) == f"{folder} lacks {name}, which its index names"


def test_a_folder_of_another_revision_is_refused(
    downloaded: Path, tmp_path: Path, no_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetched(tmp_path / "upstream", "--from", downloaded, "--revision", "f" * 40) == 1
    assert error(capsys) == f"{downloaded} holds revision {MAIN}, not {'f' * 40}"
    assert fetched(tmp_path / "upstream", "--from", tmp_path / "none") == 1
    assert error(capsys) == f"{tmp_path / 'none'} is not a folder"
    assert fetched(tmp_path / "upstream", "--from", tmp_path / "upstream") == 1


@pytest.mark.parametrize("which", ["shard", "tokenizer.json", "config.json"])
def test_a_folder_of_git_lfs_pointers_is_refused_as_that(
    upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    folder = Path(shutil.copytree(upstream, tmp_path / "clone"))
    path = folder / (shards(upstream)[-1] if which == "shard" else which)
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")
    out = tmp_path / "upstream"
    assert fetched(out, "--from", folder) == 1
    captured = capsys.readouterr().err
    assert f"error: {path} is a git-LFS pointer" in captured and f"cd {folder} && git lfs pull" in captured
    assert not [each for each in out.rglob("*.*") if ".fetch" not in each.parts]
