"""checkpoint.prefetch and the shard that threads write together: order, bytes, bounds, and errors from other
threads."""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import Tensors, write_checkpoint
from tensors import METADATA, every_dtype, refusal
from torch import Tensor

from v4forge.checkpoint import prefetch, writer
from v4forge.checkpoint.codec import spec_of
from v4forge.checkpoint.formats import TensorSpec
from v4forge.checkpoint.prefetch import Group, Reader, done
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.writer import SharedShard, tensor_bytes, write_shard
from v4forge.profiling import Watch

CPU = torch.device("cpu")
ENOUGH = 1 << 30
Groups = list[tuple[int, list[str]]]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    write_checkpoint(directory, shards=3)
    return directory


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def groups_of(source: Checkpoint, size: int = 7) -> Groups:
    """All tensors, shuffled, `size` a group; the layer is the group's number."""
    names = sorted(source.weight_map)
    random.Random(1).shuffle(names)
    return [(i, names[start : start + size]) for i, start in enumerate(range(0, len(names), size))]


def reading(source: Checkpoint, groups: Groups, ahead: int = ENOUGH, watch: Watch | None = None) -> Reader:
    return Reader(source, groups, ahead, CPU, watch or Watch(CPU))


def soon(condition: Callable[[], bool], within_s: float = 5) -> bool:
    """Waits until it holds; False if it does not in time."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def same(one: Tensor, other: Tensor) -> bool:
    """The same dtype, shape and bytes."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and tensor_bytes(one) == tensor_bytes(other)


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


@pytest.mark.parametrize("ahead", [0, 10_000, ENOUGH])
@pytest.mark.parametrize("request_bytes", [1000, prefetch.READ_BYTES])
def test_groups_come_in_order_with_the_bytes_of_the_shards(
    pristine: Path, ahead: int, request_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "READ_BYTES", request_bytes)
    source = Checkpoint(pristine)
    groups = groups_of(source)
    with reading(source, groups, ahead) as reader:
        for _, names in groups:
            tensors = next(reader).tensors()
            assert list(tensors) == names
            for name, tensor in tensors.items():
                assert same(tensor, source.raw(name)), name


def test_tensors_of_one_form_are_stacked_without_a_copy(pristine: Path) -> None:
    source = Checkpoint(pristine)
    alike = [f"layers.1.ffn.experts.{e}.w1.weight" for e in range(4)]
    odd = ["layers.1.attn_norm.weight", "layers.1.ffn.experts.0.w1.scale"]
    with reading(source, [(0, [odd[0], *alike, odd[1]])]) as reader:
        group = next(reader)
    stacked = group.stacked(alike)
    assert same(stacked, torch.stack([source.raw(name) for name in alike]))
    assert stacked.untyped_storage().data_ptr() == group.buffer.untyped_storage().data_ptr()
    assert same(group.stacked(alike[1:3]), stacked[1:3])
    for wrong in (alike[::-1], [alike[0], alike[2]], odd, [*alike, odd[1]], [alike[0], alike[0]]):
        with pytest.raises(ValueError, match="does not lie behind"):
            group.stacked(wrong)


def test_a_stack_leaves_out_what_aligns_its_tensors() -> None:
    spec = TensorSpec("I16", (1, 3))  # 6 bytes, and the next tensor is 64 behind
    buffer = torch.arange(96, dtype=torch.int16)
    group = Group(buffer.view(torch.uint8), {"a": (0, spec), "b": (64, spec), "c": (126, spec)})
    assert group.stacked(["a", "b"]).tolist() == [[[0, 1, 2]], [[32, 33, 34]]]
    assert group.stacked(["a", "b"]).data_ptr() == buffer.data_ptr()
    with pytest.raises(ValueError, match="c does not lie behind a"):
        group.stacked(["a", "b", "c"])


def sizes_of(source: Checkpoint, groups: Groups) -> list[int]:
    aligned = [[-(-source.raw(n).nbytes // prefetch.ALIGNMENT) * prefetch.ALIGNMENT for n in g] for _, g in groups]
    return [sum(each) for each in aligned]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_no_more_is_read_ahead_than_asked_for(pristine: Path, share: float) -> None:
    source = Checkpoint(pristine)
    groups = groups_of(source)
    sizes = sizes_of(source, groups)
    ahead, watch = int(share * sum(sizes)), Watch(CPU)

    def expected(taken: int) -> int:
        """How many groups are read when so many have been taken: one at least, and more as far as they fit."""
        count = taken + 1
        while count < len(groups) and sum(sizes[taken : count + 1]) <= ahead:
            count += 1
        return min(count, len(groups))

    with reading(source, groups, ahead, watch) as reader:
        for taken in range(len(groups)):
            assert soon(lambda taken=taken: len(watch.spans()) == expected(taken))
            time.sleep(0.002)
            assert len(watch.spans()) == expected(taken)
            next(reader)
    assert [span.layer for span in watch.spans()] == [layer for layer, _ in groups]
    assert [span.bytes for span in watch.spans()] == sizes


def test_a_group_larger_than_the_limit_is_read_alone(pristine: Path) -> None:
    source = Checkpoint(pristine)
    groups = groups_of(source, size=40)
    with reading(source, groups, ahead=1) as reader:
        for _, names in groups:
            assert list(next(reader).tensors()) == names


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, remove])
def test_a_shard_that_is_damaged_during_a_run_is_an_error_of_the_reader(
    source: Path, damage: Callable[[Path], None]
) -> None:
    opened = Checkpoint(source)
    by_shard: dict[str, list[str]] = {shard: [] for shard in opened.shard_names}
    for name, shard in opened.weight_map.items():
        by_shard[shard].append(name)
    first, last = opened.shard_names[0], opened.shard_names[-1]
    damage(source / last)
    with reading(opened, [(0, by_shard[first]), (1, by_shard[last]), (2, by_shard[first][:1])]) as reader:
        assert list(next(reader).tensors()) == by_shard[first]
        said = refusal(lambda: next(reader))
    assert str(source / last) in said


def test_a_disk_that_fails_is_an_error_of_the_reader(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Checkpoint(pristine)
    groups = groups_of(source)
    (first, *_), healthy = groups[2][1], os.preadv
    path, start = source.place(first)

    def failing(file: int, buffers: Sequence[Any], offset: int) -> int:
        if offset == start and os.readlink(f"/proc/self/fd/{file}") == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return healthy(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    with reading(source, groups) as reader:
        assert [list(next(reader).tensors()) for _ in range(2)] == [names for _, names in groups[:2]]
        assert refusal(lambda: next(reader)) == f"{path} cannot be read: {os.strerror(errno.EIO)}"


@pytest.mark.parametrize("ahead", [0, ENOUGH])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_ends_the_reader_s_threads_and_files(pristine: Path, taken: int, ahead: int) -> None:
    source = Checkpoint(pristine)
    groups = groups_of(source)
    before, files = threads(), len(os.listdir("/proc/self/fd"))
    start = time.monotonic()
    with reading(source, groups, ahead) as reader:
        for _ in range(taken):
            next(reader)
    assert time.monotonic() - start < 5
    assert threads() == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_done_waits_for_all_jobs_and_forgets_them() -> None:
    gate, ended = threading.Event(), []
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(lambda i=i: gate.wait() and ended.append(i)) for i in range(5)]
        threading.Timer(0.05, gate.set).start()
        done(jobs)
        assert sorted(ended) == [0, 1, 2, 3, 4]
        assert jobs == []


def test_the_first_error_of_the_jobs_comes_from_done() -> None:
    def failing(number: int) -> None:
        raise OSError(number, f"job {number}")

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(failing, number) if number in (2, 4) else pool.submit(int) for number in range(6)]
        with pytest.raises(OSError, match="job 2"):
            done(jobs)


def specs_of(tensors: Tensors) -> dict[str, TensorSpec]:
    return {name: spec_of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("seed", range(4))
def test_a_shared_shard_has_the_bytes_of_write_shard_in_any_order_from_any_thread(tmp_path: Path, seed: int) -> None:
    tensors = every_dtype() | {f"large {i}": torch.randn(300, 100) for i in range(8)}
    write_shard(tmp_path / "whole.safetensors", tensors, METADATA)
    names = list(tensors)
    random.Random(seed).shuffle(names)
    path = tmp_path / "shared.safetensors"
    # two objects on one file, as two processes have them; specs and metadata in another order
    specs = specs_of({name: tensors[name] for name in names})
    made, other = (SharedShard(path, specs, dict(reversed(METADATA.items()))) for _ in range(2))
    made.create()
    other.open()
    with ThreadPoolExecutor(3) as pool:
        done([pool.submit((made, other)[i % 2].write, {name: tensors[name]}) for i, name in enumerate(names)])
    assert not path.exists()
    other.close()
    made.publish()
    made.close()
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"shared.safetensors", "whole.safetensors"}


def test_short_writes_of_the_system_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = every_dtype()
    write_shard(tmp_path / "whole.safetensors", tensors, METADATA)
    shard = SharedShard(tmp_path / "shared.safetensors", specs_of(tensors), METADATA)
    shard.create()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    shard.write(tensors)
    shard.publish()
    shard.close()
    assert shard.path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    "wrong", [torch.zeros(3, 5), torch.zeros(5, 3).bfloat16(), torch.zeros(3, 4).bfloat16()], ids=lambda t: str(t.shape)
)
def test_a_tensor_of_another_form_is_refused_by_a_shared_shard(tmp_path: Path, wrong: Tensor) -> None:
    shard = SharedShard(tmp_path / "shared.safetensors", specs_of(every_dtype()))
    shard.create()
    with pytest.raises(ValueError, match="bf16 is"):
        shard.write({"bf16": wrong})
    with pytest.raises(KeyError):
        shard.write({"unknown": wrong})
    shard.close()
    assert not shard.path.exists()


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "replace"])
def test_a_full_disk_is_an_error_of_a_shared_shard_without_a_file(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = every_dtype()
    shard = SharedShard(tmp_path / "shared.safetensors", specs_of(tensors))

    def written() -> None:
        shard.create()
        shard.write(tensors)
        shard.publish()

    monkeypatch.setattr(writer.os, call, full)
    assert refusal(written) == f"cannot write {shard.path}: No space left on device"
    shard.close()
    assert not shard.path.exists()


def test_a_full_disk_in_a_writing_thread_is_an_error_of_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = every_dtype()
    shard = SharedShard(tmp_path / "shared.safetensors", specs_of(tensors))
    shard.create()
    monkeypatch.setattr(writer.os, "pwrite", full)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(shard.write, {name: tensor}) for name, tensor in tensors.items()]
        assert refusal(lambda: done(jobs)) == f"cannot write {shard.path}: No space left on device"
    shard.close()
    assert not shard.path.exists()


def test_a_file_system_that_cannot_reserve_space_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(writer.os, "posix_fallocate", unsupported)
    tensors = every_dtype()
    write_shard(tmp_path / "whole.safetensors", tensors)
    shard = SharedShard(tmp_path / "shared.safetensors", specs_of(tensors))
    shard.create()
    shard.write(tensors)
    shard.publish()
    shard.close()
    assert shard.path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
