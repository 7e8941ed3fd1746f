"""make fetch against a server that speaks as the hub: whole, cut, killed, corrupted, refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fetched import (
    REPO,
    TOKEN,
    asked_bytes,
    assert_same,
    error,
    fetched,
    in_process,
    said,
    serving_upstream,
    shards,
    write_upstream,
)
from hub_stand_in import CHUNK_BYTES, MAIN, Call, Fault, Hub, Repo, sha256_of
from programs import ROOT

from v4forge.checkpoint import incoming as incoming_folder
from v4forge.checkpoint.reader import INDEX
from v4forge.digests import Digests
from v4forge.hub import fetch, partial_file
from v4forge.hub.pending import in_order


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_upstream(tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def served(upstream: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving_upstream(upstream, monkeypatch, tmp_path) as hub:
        yield hub


def test_a_repository_comes_whole_and_each_byte_once(served: Hub, upstream: Path, tmp_path: Path) -> None:
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)
    for path in upstream.rglob("*.*"):
        assert asked_bytes(served, path.relative_to(upstream).as_posix()) == path.stat().st_size, path.name


def test_what_is_here_and_right_is_not_asked_for_again(served: Hub, upstream: Path, tmp_path: Path) -> None:
    out = tmp_path / "upstream"
    shutil.copytree(upstream, out)
    assert fetched(out) == 0
    assert_same(out, upstream)
    assert not any(served.asked_for(REPO, name) for name in [*shards(upstream), INDEX, "LICENSE"])


def test_what_fetch_has_verified_is_not_hashed_again(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "upstream"
    assert fetched(out) == 0
    hashed: list[Path] = []
    monkeypatch.setattr("v4forge.digests.file_sha256", lambda path: hashed.append(path) or "?")
    digests = Digests(tmp_path / ".stamps" / "digests.json")
    for path, digest in digests.of([path for path in out.iterdir() if path.is_file()]).items():
        assert digest == sha256_of(path.read_bytes())
    assert fetched(out) == 0
    assert hashed == []


def test_a_file_that_is_another_is_replaced(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "upstream"
    shutil.copytree(upstream, out)
    shard = out / shards(upstream)[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (out / "config.json").write_text("{}")
    assert fetched(out) == 0
    assert_same(out, upstream)
    told = said(capsys)
    assert f"{shard} is not what the hub has: replaced" in told and f"{out / 'config.json'} is not" in told


def test_a_cut_connection_goes_on_behind_the_last_byte(served: Hub, upstream: Path, tmp_path: Path) -> None:
    served.faults.append(Fault("/cdn/", times=6, cut_after=3 * CHUNK_BYTES))
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)
    for name in shards(upstream):
        assert asked_bytes(served, name) == (upstream / name).stat().st_size
    assert any(request.start for name in shards(upstream) for request in served.asked_for(REPO, name))


def test_a_server_that_knows_no_range_gives_the_whole(
    served: Hub, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Call, "file", lambda self, content, headers: self.say(200, content, headers))
    served.faults.append(Fault("/cdn/", times=5, cut_after=5 * CHUNK_BYTES))
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)


def test_killed_within_a_shard_it_goes_on_from_there(served: Hub, upstream: Path, tmp_path: Path) -> None:
    out = tmp_path / "upstream"
    slow = Fault("/cdn/", times=-1, bytes_s=1e6)
    served.faults.append(slow)
    program = in_process(out, "--workers", 2)
    incoming, header = incoming_folder.incoming(out), 1 << 19
    deadline = time.monotonic() + 100
    while not any(path.stat().st_size > header for path in incoming.glob("*.part") if path.exists()):
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.01)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert not incoming_folder.live(out)
    partly = {path.name.split(".safetensors")[0] + ".safetensors": path.stat().st_size for path in incoming.iterdir()}
    assert partly
    assert not any((out / name).exists() for name in partly)
    before = len(served.requests)
    slow.times = 0
    assert fetched(out) == 0
    assert_same(out, upstream)
    served.requests = served.requests[before:]
    for name, size in partly.items():
        asked = served.asked_for(REPO, name)
        assert [request.start for request in asked if request.start < size] == [], name
        assert sum(request.sent for request in asked) == (upstream / name).stat().st_size - size


def test_interrupted_it_says_that_it_goes_on_and_does(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "upstream"
    large = [path for path in shards(upstream) if (upstream / path).stat().st_size > 8 * CHUNK_BYTES]
    served.faults.append(Fault("/cdn/", times=-1, bytes_s=2e6))
    wait = fetch.wait

    def ctrl_c(*given: Any) -> Any:
        if incoming_folder.ready(out) and any(request.start for request in served.asked_for(REPO, large[0])):
            raise KeyboardInterrupt
        return wait(*given)

    monkeypatch.setattr(fetch, "wait", ctrl_c)
    assert fetched(out) == 130
    assert "goes on" in said(capsys) and list(incoming_folder.incoming(out).iterdir())
    monkeypatch.setattr(fetch, "wait", wait)
    served.faults.clear()
    assert fetched(out) == 0
    assert_same(out, upstream)
    for name in large:
        assert asked_bytes(served, name) < (upstream / name).stat().st_size + 8 * CHUNK_BYTES


def test_a_flipped_byte_is_noticed_and_the_file_comes_once_more(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = shards(upstream)[0]
    content = (upstream / name).read_bytes()
    served.faults += [Fault(f"/cdn/{sha256_of(content)}", flip=len(content) - 9, times=2)]
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)
    assert f"{name} came damaged (sha256 " in said(capsys)


def test_a_header_with_a_flipped_byte_comes_once_more(served: Hub, upstream: Path, tmp_path: Path) -> None:
    served.faults.append(Fault("/cdn/", flip=8))
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)


def test_a_small_file_is_checked_too(served: Hub, upstream: Path, tmp_path: Path) -> None:
    served.faults.append(Fault("/resolve/.*/LICENSE", flip=1))
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)


def test_damaged_twice_is_an_error_and_leaves_no_file(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = shards(upstream)[0]
    content = (upstream / name).read_bytes()
    served.faults.append(Fault(f"/cdn/{sha256_of(content)}", flip=len(content) - 9, times=-1))
    out = tmp_path / "upstream"
    assert fetched(out) == 1
    assert error(capsys).startswith(f"{name} came damaged 2 times: sha256 ")
    assert not (out / name).exists()
    served.faults.clear()
    assert fetched(out) == 0
    assert_same(out, upstream)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_refusal_is_asked_again(served: Hub, upstream: Path, tmp_path: Path, status: int) -> None:
    retry = {"Retry-After": "0"} if status == 429 else {}
    for path in ("/api/models/", "/cdn/", "/resolve/"):
        served.faults.append(Fault(path, times=2, status=status, headers=retry))
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)


def test_a_hub_that_stays_broken_is_an_error_that_says_so(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served.faults.append(Fault("/cdn/", times=-1, status=500))
    assert fetched(tmp_path / "upstream") == 1
    assert "could not be downloaded: the answer was 500 Internal Server Error" in error(capsys)


def test_no_network_is_an_error_that_says_so(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetched(tmp_path / "upstream") == 1
    assert f"{REPO} could not be downloaded: " in error(capsys)
    monkeypatch.setenv("HF_ENDPOINT", "nonsense")
    assert fetched(tmp_path / "upstream") == 1
    assert error(capsys).startswith("HF_ENDPOINT=nonsense does not begin with http")


def test_a_server_that_is_no_hub_is_said_to_be_none(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "model_info", lambda call, **_: call.say(200, b"<html>"), raising=False)
    assert fetched(tmp_path / "upstream") == 1
    assert f"{served.url} does not list {REPO} as a hub does" in error(capsys)


def test_a_revision_and_a_repository_that_are_not_there_are_named(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "f" * 40
    assert fetched(tmp_path / "upstream", "--revision", other) == 1
    assert error(capsys) == f"{REPO} has no revision {other}"
    assert fetched(tmp_path / "upstream", "--repo", "some/other") == 1
    assert error(capsys) == "some/other is not on the hub, or not for you"
    assert fetched(tmp_path / "upstream", "--revision", "main") == 1
    assert error(capsys) == "the revision is not a commit: main"


def test_a_gated_repository_needs_a_token_which_is_never_said(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served.repos[REPO] = Repo.of(upstream, gated=True, tokens={TOKEN})
    out = tmp_path / "upstream"
    assert fetched(out) == 1
    assert error(capsys) == f"{REPO} is gated, and no token is set"
    monkeypatch.setenv("HF_TOKEN", "hf_" + "other" * 5)
    assert fetched(out) == 1
    printed = capsys.readouterr().err
    assert "this token has no access to it" in printed and "hf_other" not in printed
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetched(out) == 0
    assert_same(out, upstream)
    assert TOKEN not in said(capsys)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)


def test_the_token_goes_to_the_hub_and_nowhere_else(
    served: Hub, upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetched(tmp_path / "upstream") == 0
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in served.asked("/resolve/|/api/"))
    assert served.asked("/cdn/") and not any("authorization" in request.headers for request in served.asked("/cdn/"))


def test_too_small_a_disk_is_said_before_anything_comes(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(1, 1, 1 << 20))
    assert fetched(tmp_path / "upstream") == 1
    assert "GB free, the checkpoint takes" in error(capsys)
    assert len(served.asked("/resolve/")) == len(served.asked_for(REPO, "config.json")) == 1


def test_a_disk_that_fills_up_is_an_error_and_the_rest_goes_on_later(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.write, 8 * CHUNK_BYTES

    def full(descriptor: int, data: memoryview) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= len(data)
        return write(descriptor, data)

    out = tmp_path / "upstream"
    monkeypatch.setattr(partial_file.os, "write", full)
    assert fetched(out, "--workers", 2) == 1
    assert error(capsys).endswith(": No space left on device")
    monkeypatch.setattr(partial_file.os, "write", write)
    assert fetched(out) == 0
    assert_same(out, upstream)


def test_a_checkpoint_of_another_kind_is_refused_by_its_headers(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = served.repos[REPO].commits[MAIN]
    config = json.loads(contents["config.json"])
    contents["config.json"] = json.dumps(config | {"vocab_size": 4096}).encode()
    out = tmp_path / "upstream"
    assert fetched(out) == 1
    assert "config.json asks for" in error(capsys)
    for name in shards(upstream):
        assert asked_bytes(served, name) < (upstream / name).stat().st_size
    assert not incoming_folder.ready(out)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [({"expert_dtype": "fp8"}, "that is the Base release"), ({"scoring_func": "softmax"}, "it must be 'sqrtsoftplus'")],
)
def test_a_model_that_is_not_supported_is_refused_by_its_config_alone(
    served: Hub,
    upstream: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    fact: str,
) -> None:
    out, commit = tmp_path / "upstream", "b" * 40
    assert fetched(out) == 0
    files = served.repos[REPO].commits[MAIN]
    config = json.dumps(json.loads(files["config.json"]) | changes).encode()
    served.repos[REPO].commits[commit] = files | {"config.json": config}
    before = len(served.requests)
    assert fetched(out, "--revision", commit) == 1
    said_of_it = error(capsys)
    assert said_of_it.startswith(f"config.json of {REPO} at {commit[:12]}: ") and fact in said_of_it
    assert sum(request.sent for request in served.requests[before:] if "/resolve/" in request.path) == len(config)
    assert_same(out, upstream)  # the folder is as it was


def test_a_config_that_came_damaged_comes_once_more(served: Hub, upstream: Path, tmp_path: Path) -> None:
    served.faults.append(Fault("/resolve/.*/config.json", flip=1))
    assert fetched(tmp_path / "upstream") == 0
    assert_same(tmp_path / "upstream", upstream)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_repository_that_is_no_checkpoint_is_refused(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    del served.repos[REPO].commits[MAIN][name]
    assert fetched(tmp_path / "upstream") == 1
    assert f" has no {name}" in error(capsys)
    assert not served.asked("/resolve/")


def test_a_repository_without_an_index_is_refused(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del served.repos[REPO].commits[MAIN][INDEX]
    assert fetched(tmp_path / "upstream") == 1
    assert error(capsys) == f"{REPO} has no {INDEX}: it is no checkpoint of this kind"


def test_other_forms_of_weights_stay_where_they_are(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"pytorch_model.bin": b"1", "x.gguf": b"2", "paper.pdf": b"3", "../up.json": b"4", ".gitattributes": b"5"}
    served.repos[REPO].commits[MAIN] |= {**more, "other.safetensors": b"6"}
    out = tmp_path / "upstream"
    assert fetched(out) == 0
    assert not any((out / name).exists() for name in more) and not (out / "other.safetensors").exists()
    told = said(capsys)
    assert "pytorch_model.bin" in told and "skipped, not in the index: other.safetensors" in told
    assert "other.safetensors" not in incoming_folder.listing(out).files


def test_a_second_fetch_of_a_folder_is_refused(served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "upstream"
    with incoming_folder.marked(out):
        assert incoming_folder.live(out)
        assert fetched(out) == 1
    assert error(capsys) == f"another fetch is writing to {out}"
    assert not incoming_folder.live(out)


def test_a_dry_run_says_what_would_come_and_writes_nothing(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "upstream"
    assert fetched(out, "--dry-run") == 0
    told = said(capsys)
    assert not out.exists() and not served.asked("/resolve/")
    assert all(name in told for name in [*shards(upstream), INDEX, "encoding/chat.py"])
    shutil.copytree(upstream, out)
    assert fetched(out, "--dry-run") == 0
    assert "is here, to be checked" in said(capsys)


def test_the_plan_keeps_what_the_hub_says(served: Hub, upstream: Path, tmp_path: Path) -> None:
    out = tmp_path / "upstream"
    assert incoming_folder.listing(out) is None
    assert fetched(out) == 0
    listing = incoming_folder.listing(out)
    assert listing is not None and (listing.repo, listing.revision) == (REPO, MAIN)
    for name in shards(upstream):
        content = (upstream / name).read_bytes()
        assert listing.files[name] == incoming_folder.Expected(
            name, len(content), hashlib.sha256(content).hexdigest(), None
        )
    assert listing.files["config.json"].git_sha1 is not None
    assert incoming_folder.ready(out) and not incoming_folder.live(out)


def test_what_an_earlier_revision_had_and_this_one_has_not_is_removed(
    served: Hub, upstream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, commit = tmp_path / "upstream", "a" * 40
    files = served.repos[REPO].commits[MAIN]
    served.repos[REPO].commits[commit] = files | {"former.json": b"{}", "old/notes.py": b"# old"}
    assert fetched(out, "--revision", commit) == 0
    (out / "my notes.txt").write_text("of the user")
    begun = incoming_folder.incoming(out) / "model-00001-of-00009.safetensors.0123456789abcdef.part"
    begun.parent.mkdir()
    begun.write_bytes(b"half of a shard")
    assert fetched(out) == 0
    assert f"{out / 'former.json'} is of an earlier fetch, the hub has none: removed" in said(capsys)
    assert (out / "my notes.txt").read_text() == "of the user"
    (out / "my notes.txt").unlink()
    assert_same(out, upstream)


def test_half_a_file_that_is_linked_to_somebodys_own_is_not_written_to(tmp_path: Path) -> None:
    own, file = tmp_path / "own", incoming_folder.Expected("a.safetensors", 8, "0" * 64)
    own.write_bytes(b"mine")
    path = partial_file.path_of(tmp_path / "upstream", file)
    path.parent.mkdir(parents=True)
    path.hardlink_to(own)
    with partial_file.Partial(path, file) as held:
        assert held.size == 0
        held.write(b"the hub's")
    assert own.read_bytes() == b"mine"


def test_shards_come_in_the_order_in_which_layers_need_them() -> None:
    weight_map = {
        "layers.1.a": "c",
        "layers.2.a": "c",
        "layers.10.a": "d",
        "layers.2.b": "d2",
        "layers.0.a": "b",
        "mtp.0.x": "z",
        "layers.3.a": "z",
        "head.weight": "y",
    }
    assert in_order(weight_map) == ["y", "z", "b", "c", "d2", "d"]


def test_a_download_begins_without_torch() -> None:
    program = "import sys, scripts.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
