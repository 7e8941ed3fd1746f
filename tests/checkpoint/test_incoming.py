"""Calibration of a checkpoint that fetch is still bringing: what is known from headers, what waits, until when."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fetched import ROOT_SHARD, shard_of_layer, write_by_layer
from hub_stand_in import MAIN, Fault, Repo, serving, sha256_of
from hub_stand_in import Hub as StandIn
from programs import ROOT, calibrate_arguments, contents, run_here, write_corpus, write_source

from v4forge import files
from v4forge.checkpoint import incoming, layout, safetensors_header
from v4forge.checkpoint.prefetch import Reader
from v4forge.checkpoint.reader import Checkpoint
from v4forge.digests import Digests
from v4forge.errors import UserError
from v4forge.hub import fetch as hub_fetch
from v4forge.hub.hub_source import Hub
from v4forge.hub.pending import looked_over
from v4forge.profiling import Watch
from v4forge.quantization import layer_files

REPO = "some/model"
LAYERS = [shard_of_layer(layer) for layer in range(3)]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one shard a layer, and one for root and MTP."""
    made = tmp_path_factory.mktemp("made")
    write_source(made)
    return write_by_layer(made, tmp_path_factory.mktemp("upstream"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "POLL_S", 0.01)


@pytest.fixture
def incomplete(upstream: Path, tmp_path: Path) -> Path:
    """The checkpoint without the last layer's shard, of which there is the header."""
    folder = tmp_path / "upstream"
    shutil.copytree(upstream, folder)
    header = incoming.header_file(folder, LAYERS[-1])
    header.parent.mkdir(parents=True)
    header.write_bytes(safetensors_header.read_head(folder / LAYERS[-1]))
    size = (folder / LAYERS[-1]).stat().st_size
    digest = sha256_of((folder / LAYERS[-1]).read_bytes())
    incoming.write_listing(
        folder, incoming.Listing(REPO, MAIN, {LAYERS[-1]: incoming.Expected(LAYERS[-1], size, digest, None)})
    )
    (folder / LAYERS[-1]).unlink()
    return folder


@contextmanager
def after(seconds: float, action: Callable[[], object]) -> Iterator[None]:
    """Does something in the middle of the block."""
    timer = threading.Timer(seconds, action)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Fetch is at work, and index and headers are there."""
    with incoming.marked(folder) as mark_ready:
        mark_ready()
        yield


def fact(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "make fetch" in caught.value.hint
    return caught.value.fact


def bring(upstream: Path, folder: Path) -> None:
    """As fetch does: under another name, then by a rename."""
    shutil.copyfile(upstream / LAYERS[-1], folder / ".part")
    os.replace(folder / ".part", folder / LAYERS[-1])


def test_a_missing_shard_is_an_error_at_once_when_nobody_brings_it(incomplete: Path) -> None:
    with pytest.raises(UserError) as caught:
        Checkpoint(incomplete)
    assert caught.value.fact == f"shard {incomplete / LAYERS[-1]} is missing"


def test_the_whole_layout_is_checked_by_headers(incomplete: Path, upstream: Path) -> None:
    whole = Checkpoint(upstream)
    with filling(incomplete):
        opened = Checkpoint(incomplete)
        opened.validate(layout.upstream(opened.config))
    assert opened.shard_names == whole.shard_names
    for name in whole.weight_map:
        assert opened.spec(name) == whole.spec(name)
        assert opened.place(name)[1] == whole.place(name)[1]
    assert opened.metadata(LAYERS[-1]) == whole.metadata(LAYERS[-1])


def test_a_wrong_header_is_refused(incomplete: Path) -> None:
    header = incoming.header_file(incomplete, LAYERS[-1])
    good = header.read_bytes()
    sizes = json.loads(good[8:])
    name = next(name for name in sizes if name != "__metadata__")
    gap = json.dumps(sizes | {name: sizes[name] | {"data_offsets": [7, 9]}}).encode()
    with filling(incomplete):
        for bad in (b"", good[:100], good[:8] + b"x" * (len(good) - 8), len(gap).to_bytes(8, "little") + gap):
            header.write_bytes(bad)
            with pytest.raises(UserError) as caught:
                Checkpoint(incomplete)
            assert f"shard {incomplete / LAYERS[-1]} is truncated or not safetensors" in caught.value.fact


def test_a_tensor_is_waited_for(incomplete: Path, upstream: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = next(n for n, shard in Checkpoint(upstream).weight_map.items() if shard == LAYERS[-1])

    def bring_once_waited_for() -> None:
        wait_until(lambda: bool(caplog.records))
        bring(upstream, incomplete)

    with filling(incomplete), after(0, bring_once_waited_for):
        read = Checkpoint(incomplete).raw(name)
    assert torch.equal(read.view(torch.uint8), Checkpoint(upstream).raw(name).view(torch.uint8))
    assert [record.message for record in caplog.records] == [f"waiting for {LAYERS[-1]}, which fetch is bringing"]


def test_a_fetch_that_ends_without_the_shard_ends_the_wait(incomplete: Path, caplog: pytest.LogCaptureFixture) -> None:
    with filling(incomplete):
        opened = Checkpoint(incomplete)
        name = next(n for n, shard in opened.weight_map.items() if shard == LAYERS[-1])
        assert opened.raw("norm.weight") is not None
    expected = f"shard {incomplete / LAYERS[-1]} is missing"
    assert fact(lambda: opened.raw(name)) == expected
    program = "import sys, time; from pathlib import Path; from v4forge.checkpoint import incoming\n"
    program += "with incoming.marked(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", program, str(incomplete)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as fetch:
        assert fetch.stdout is not None and fetch.stdout.readline()
        assert incoming.live(incomplete)
        caplog.clear()

        def kill_once_waited_for() -> None:
            wait_until(lambda: bool(caplog.records))
            fetch.send_signal(signal.SIGKILL)

        with after(0, kill_once_waited_for):
            assert fact(lambda: opened.raw(name)) == f"{expected}, and the fetch that was to bring it has ended"


def test_a_shard_that_came_with_another_header_is_not_read(incomplete: Path, upstream: Path) -> None:
    with filling(incomplete):
        opened = Checkpoint(incomplete)
        shutil.copyfile(upstream / ROOT_SHARD, incomplete / LAYERS[-1])
        name = next(n for n, shard in opened.weight_map.items() if shard == LAYERS[-1])
        with pytest.raises(UserError) as caught:
            opened.raw(name)
    assert caught.value.fact == f"the header of {incomplete / LAYERS[-1]} came damaged before it"


def groups(folder: Path, block: str) -> list[tuple[int, list[str]]]:
    return [(2, sorted(name for name in Checkpoint(folder).weight_map if name.startswith(block)))]


def test_the_reader_waits_and_reads_the_bytes_of_a_complete_checkpoint(incomplete: Path, upstream: Path) -> None:
    device = torch.device("cpu")
    wanted = groups(upstream, "layers.2.")
    with Reader(Checkpoint(upstream), wanted, 1 << 30, device, Watch(device)) as reader:
        whole = next(reader).tensors()
    watch = Watch(device)
    with (
        filling(incomplete),
        after(1.0, lambda: bring(upstream, incomplete)),
        Reader(Checkpoint(incomplete), wanted, 1 << 30, device, watch) as reader,
    ):
        read = next(reader).tensors()
        assert all(torch.equal(read[name].view(torch.uint8), whole[name].view(torch.uint8)) for name in whole)
    waited = {span.what: span.end_s - span.start_s for span in watch.spans()}
    assert waited["fetch"] > waited["read"] > 0


def test_a_reader_that_waits_can_be_closed(incomplete: Path, upstream: Path) -> None:
    device = torch.device("cpu")
    began = time.monotonic()
    with (
        filling(incomplete),
        Reader(Checkpoint(incomplete), groups(upstream, "layers.2."), 1 << 30, device, Watch(device)),
    ):
        time.sleep(0.1)
    assert time.monotonic() - began < 5


def test_a_rank_waits_for_all_of_a_layer_not_only_for_its_own_experts(incomplete: Path, upstream: Path) -> None:
    """Else one rank would go on, and wait in a collective for those that have no shard yet."""
    index = json.loads((incomplete / incoming.INDEX).read_text())["weight_map"]
    with filling(incomplete):
        opened = Checkpoint(incomplete)
        opened.weight_map["layers.1.ffn.experts.3.w1.weight"] = LAYERS[-1]  # a layer in two shards
        other = "layers.1.ffn.experts.0.w1.weight"
        assert index[other] == LAYERS[1] and (incomplete / LAYERS[1]).exists()
        assert not opened.arrived([other], lambda: True)
        assert opened.arrived(["layers.0.ffn.experts.0.w1.weight", "norm.weight"], lambda: True)


def test_the_fingerprint_is_that_of_the_complete_checkpoint(incomplete: Path, upstream: Path, tmp_path: Path) -> None:
    names = Checkpoint(upstream).shard_names
    whole = layer_files.source_digests(upstream, names, tmp_path / "a.json")
    with filling(incomplete):
        assert layer_files.source_digests(incomplete, names, tmp_path / "b.json") == whole
        incoming.write_listing(incomplete, incoming.Listing(None, None, {}))  # of a plain folder: no hashes
        with after(0.1, lambda: bring(upstream, incomplete)):
            assert layer_files.source_digests(incomplete, names, tmp_path / "c.json") == whole


def test_a_program_that_starts_too_early_waits_for_index_and_headers(upstream: Path, tmp_path: Path) -> None:
    folder = tmp_path / "upstream"
    with incoming.marked(folder) as mark_ready:
        assert not incoming.ready(folder)

        def filled() -> None:
            shutil.copytree(upstream, folder, dirs_exist_ok=True)
            mark_ready()

        with after(0.2, filled):
            assert Checkpoint(folder).config.num_hidden_layers == 3
        assert incoming.ready(folder)
    with incoming.marked(folder):
        assert not incoming.ready(folder)  # of this fetch


def test_a_folder_of_an_earlier_revision_is_not_opened_before_its_fetch_says_what_there_will_be(
    upstream: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "upstream"
    shutil.copytree(upstream, folder)  # whole, with an index of its own
    other = json.loads((folder / incoming.INDEX).read_text())
    other["weight_map"]["norm.weight"] = LAYERS[0]  # which no shard agrees with
    new = (folder / incoming.INDEX).read_text()
    (folder / incoming.INDEX).write_text(json.dumps(other))
    with incoming.marked(folder) as mark_ready:

        def renewed() -> None:
            (folder / incoming.INDEX).write_text(new)
            mark_ready()

        with after(0.2, renewed):
            assert Checkpoint(folder).weight_map["norm.weight"] == ROOT_SHARD


def test_a_fetch_that_ends_before_the_digests_are_asked_for_is_named(incomplete: Path, tmp_path: Path) -> None:
    with filling(incomplete):
        names = Checkpoint(incomplete).shard_names
    expected = f"shard {incomplete / LAYERS[-1]} is missing"
    assert fact(lambda: layer_files.source_digests(incomplete, names, tmp_path / "digests.json")) == expected


def test_a_file_system_without_locks_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refused)
    with pytest.raises(UserError, match=r"cannot lock .*: No locks available"), incoming.marked(tmp_path):
        pass
    assert not incoming.live(tmp_path)


def test_who_asks_whether_fetch_lives_does_not_keep_it_from_beginning(tmp_path: Path) -> None:
    with incoming.marked(tmp_path):
        pass
    asking = os.open(tmp_path / ".fetch" / "lock", os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    with after(0.1, lambda: os.close(asking)), incoming.marked(tmp_path):
        assert incoming.live(tmp_path)


# With the programs.


@pytest.fixture
def hub(upstream: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(hub_fetch, "HEADER_BYTES", HEADER_BYTES)
    with serving(StandIn({REPO: Repo.of(upstream)})) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def holding(hub: StandIn, upstream: Path, shard: str) -> threading.Event:
    """Lets a shard stop after its header, until the event."""
    content = (upstream / shard).read_bytes()
    event = threading.Event()
    hub.faults += [Fault(f"/cdn/{sha256_of(content)}"), Fault(f"/cdn/{sha256_of(content)}", times=-1, held=event)]
    return event


# The program, with headers that are asked for by fewer bytes than these shards have.
HEADER_BYTES = 1 << 16
FETCH = f"""
from scripts import fetch
from v4forge import errors
from v4forge.hub import fetch as hub_fetch
hub_fetch.HEADER_BYTES = {HEADER_BYTES}
errors.run_main(fetch.main)
"""


def fetch_program(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", FETCH, "--out", str(out), "--repo", REPO, "--revision", MAIN]
    return subprocess.Popen(command, cwd=ROOT)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def calibrate(source: Path, work: Path, corpus: Path) -> int:
    return run_here("calibrate", *calibrate_arguments(source, work, corpus, samples=4))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus.txt")


def test_layers_are_finished_before_the_last_shard_is_here_and_have_the_same_bytes(
    hub: StandIn, upstream: Path, tmp_path: Path, corpus: Path
) -> None:
    calm, out, work = tmp_path / "calm" / "layers", tmp_path / "w" / "upstream", tmp_path / "w" / "layers"
    assert calibrate(upstream, calm, corpus) == 0
    release = holding(hub, upstream, LAYERS[-1])
    early: list[bool] = []

    def fetch() -> None:
        digests = Digests(out.parent / ".stamps" / "digests.json")
        with incoming.marked(out) as mark_ready:
            source = Hub(REPO, MAIN)
            pending = looked_over(source, out, digests)
            hub_fetch.Fetch(source, out, 4, digests, print).run(pending, lambda *_: None, mark_ready)

    def watch() -> None:
        wait_until(layer_files.layer_file(work, 0).exists)
        early.append(not (out / LAYERS[-1]).exists())
        release.set()

    with ThreadPoolExecutor() as pool:
        fetched = pool.submit(fetch)
        wait_until(lambda: incoming.ready(out) or fetched.done())
        watched = pool.submit(watch)
        assert calibrate(out, work, corpus) == 0
        watched.result()
        fetched.result()
    assert early == [True]
    assert contents(work) == contents(calm)
    known = Digests(tmp_path / "w" / ".stamps" / "digests.json")
    assert all(known.known(out / shard) == sha256_of((upstream / shard).read_bytes()) for shard in LAYERS)


def test_a_fetch_killed_while_calibration_waits_ends_it_with_the_shards_name(
    hub: StandIn, upstream: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "w" / "upstream", tmp_path / "w" / "layers"
    release = holding(hub, upstream, LAYERS[-1])
    with fetch_program(out) as fetch:
        wait_until(lambda: incoming.ready(out) or fetch.poll() is not None)

        def kill() -> None:
            wait_until(layer_files.layer_file(work, 0).exists)
            fetch.send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        assert calibrate(out, work, corpus) == 1
        killer.join()
    printed = capsys.readouterr().err
    assert f"error: shard {out / LAYERS[-1]} is missing, and the fetch that was to bring it has ended" in printed
    assert "hint: make fetch" in printed
    release.set()
    bring(upstream, out)
    assert calibrate(out, work, corpus) == 0
