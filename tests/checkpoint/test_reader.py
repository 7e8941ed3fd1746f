"""v4forge.checkpoint.reader and v4forge.files: what is refused, and that a file is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from synthetic import OTHER, Tensors, edit, write_checkpoint
from tensors import METADATA, every_dtype, refusal
from torch import Tensor

from v4forge import files
from v4forge.checkpoint import layout, writer
from v4forge.checkpoint.reader import INDEX, Checkpoint
from v4forge.checkpoint.writer import write_shard

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    write_checkpoint(directory)
    return directory


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def validate(directory: Path) -> None:
    opened = Checkpoint(directory)
    opened.validate(layout.upstream(opened.config))


def load(directory: Path, logical: str) -> Tensor:
    opened = Checkpoint(directory)
    return opened.load(logical, dict(layout.parameters(opened.config))[logical])


def test_the_synthetic_checkpoints_are_in_the_upstream_form(pristine: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **OTHER)
    for directory, shards in ((pristine, 2), (tmp_path, 3)):
        validate(directory)
        opened = Checkpoint(directory)
        assert len(opened.shard_names) == shards
        where = opened.weight_map
        assert any(where[n] != where[n.removesuffix("scale") + "weight"] for n in where if n.endswith(".scale"))
        assert any(d % 128 and d > 128 for n in where if n.endswith("wq_b.weight") for d in opened.spec(n).shape)
        for logical, shape in layout.parameters(opened.config):
            tensor = opened.load(logical, shape)
            assert tuple(tensor.shape) == shape
            assert tensor.unique().numel() > 1 or tensor.numel() == 1


def test_a_missing_scale_is_named(source: Path) -> None:
    scale = "layers.1.attn.wq_a.scale"
    edit(source, lambda tensors: tensors.pop(scale, None))
    assert f"no tensor {scale} in {source}" in refusal(lambda: validate(source))
    assert f"tensor {scale} is missing" in refusal(lambda: load(source, "layers.1.attn.wq_a.weight"))


@pytest.mark.parametrize("kept", [0, 5, 4000, -1])
def test_a_truncated_shard_is_named(source: Path, kept: int) -> None:
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    assert f"shard {shard} is truncated" in refusal(lambda: Checkpoint(source))


def test_a_missing_shard_is_named(source: Path) -> None:
    shard = source / "model-00001-of-00002.safetensors"
    shard.unlink()
    assert refusal(lambda: Checkpoint(source)) == f"shard {shard} is missing"


def test_a_missing_or_broken_index_is_named(source: Path) -> None:
    for text in ("{", "[]", "{}"):
        (source / INDEX).write_text(text)
        assert refusal(lambda: Checkpoint(source)) == f"{source / INDEX} is not a safetensors index"
    (source / INDEX).unlink()
    assert refusal(lambda: Checkpoint(source)) == f"{source / INDEX} does not exist"


def test_an_index_that_disagrees_with_the_shards_is_refused(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    name = "embed.weight"
    shard = index["weight_map"][name]
    other = next(s for s in index["weight_map"].values() if s != shard)

    def written(weight_map: dict[str, str]) -> str:
        (source / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))
        return refusal(lambda: Checkpoint(source))

    assert written(index["weight_map"] | {name: other}) == f"{name} is not in {other}, where the index has it"
    without = {n: s for n, s in index["weight_map"].items() if n != name}
    assert written(without) == f"{shard} holds {name}, which the index does not have there"
    assert written(index["weight_map"] | {"ghost": shard}) == f"ghost is not in {shard}, where the index has it"


def test_an_unknown_tensor_is_named(source: Path) -> None:
    def add(tensors: Tensors) -> None:
        if "embed.weight" in tensors:
            tensors["layers.0.attn.extra.weight"] = torch.zeros(2)

    edit(source, add)
    assert "holds layers.0.attn.extra.weight, which DeepSeek-V4 with this config.json" in refusal(
        lambda: validate(source)
    )


def test_a_missing_mtp_block_is_said_to_be_missing(source: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("mtp.")]:
            del tensors[name]

    edit(source, drop)
    assert refusal(lambda: validate(source)).startswith("the MTP block is missing: no tensor mtp.0.")


@pytest.mark.parametrize(
    ("name", "change", "fact"),
    [
        (
            "layers.0.attn.attn_sink",
            Tensor.bfloat16,
            "layers.0.attn.attn_sink is BF16 [2], config.json asks for F32 [2]",
        ),
        ("norm.weight", lambda t: t[:-1].clone(), "norm.weight is BF16 [127], config.json asks for BF16 [128]"),
        (
            "layers.2.ffn.experts.3.w2.scale",
            lambda t: t.view(torch.uint8),
            "layers.2.ffn.experts.3.w2.scale is U8 [128, 4], config.json asks for F8_E8M0 [128, 4]",
        ),
        ("layers.0.ffn.gate.tid2eid", Tensor.float, "layers.0.ffn.gate.tid2eid is F32 [64, 2], config.json asks for"),
    ],
)
def test_a_wrong_dtype_or_shape_is_named(source: Path, name: str, change: Callable, fact: str) -> None:
    edit(source, lambda tensors: tensors.update({name: change(tensors[name])} if name in tensors else {}))
    assert fact in refusal(lambda: validate(source))
    logical = name.replace(".scale", ".weight")
    assert fact in refusal(lambda: load(source, logical))


def test_an_i32_routing_table_is_accepted_and_stays_i32(source: Path) -> None:
    name = "layers.0.ffn.gate.tid2eid"
    edit(source, lambda tensors: tensors.update({name: tensors[name].int()} if name in tensors else {}))
    validate(source)
    assert load(source, name).dtype == torch.int32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["layers.1.attn.compressor.wkv.weight", "layers.1.hc_attn_fn"])
def test_nan_and_inf_are_refused_by_name(source: Path, name: str, value: float) -> None:
    def poison(tensors: Tensors) -> None:
        if name in tensors:
            tensors[name].view(-1)[-1] = value

    edit(source, poison)
    assert refusal(lambda: load(source, name)) == f"{name} holds NaN or Inf"


def test_a_scale_outside_bf16s_range_is_refused_by_name(source: Path) -> None:
    def poison(tensors: Tensors) -> None:
        for suffix, byte in (("ffn.experts.1.w1.scale", 255), ("attn.wq_b.scale", 2)):
            if (scale := tensors.get(f"layers.2.{suffix}")) is not None:
                scale.view(torch.uint8).view(-1)[-1] = byte

    edit(source, poison)
    name = "layers.2.ffn.experts.1.w1.weight"
    assert refusal(lambda: load(source, name)).startswith(f"{name}: E8M0 scale byte 255 (NaN)")
    name = "layers.2.attn.wq_b.weight"
    assert refusal(lambda: load(source, name)).startswith(f"{name}: E8M0 scale byte 2 ")


# Writes a shard, then dies in the middle of writing a second one.
CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/support")
from tensors import METADATA, every_dtype
from v4forge.checkpoint import writer
folder = Path(sys.argv[1])
writer.write_shard(folder / "same.safetensors", every_dtype(), dict(reversed(METADATA.items())))
write, left = writer.tensor_bytes, 3
def dying(tensor):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(tensor)
writer.tensor_bytes = dying
writer.write_shard(folder / "killed.safetensors", every_dtype())
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("child")
    command = [sys.executable, "-c", CHILD, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return folder


def test_two_processes_write_the_same_bytes(child: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "same.safetensors", dict(reversed(every_dtype().items())), METADATA)
    assert (tmp_path / "same.safetensors").read_bytes() == (child / "same.safetensors").read_bytes()


def test_safetensors_reads_what_write_shard_wrote(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    write_shard(path, every_dtype(), METADATA)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **METADATA}
        assert set(file.keys()) == set(every_dtype())
        for name, tensor in every_dtype().items():
            read = file.get_tensor(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert bytes(writer.tensor_bytes(read)) == bytes(writer.tensor_bytes(tensor))


def test_a_killed_write_leaves_nothing_under_the_final_name(child: Path) -> None:
    assert not (child / "killed.safetensors").exists()
    leftovers = [p.name for p in child.iterdir() if p.name.startswith(".killed")]
    assert len(leftovers) == 1
    files.remove_leftovers(child)
    assert [p.name for p in child.iterdir()] == ["same.safetensors"]


def test_an_interrupted_write_leaves_nothing_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shard.safetensors"
    write_shard(path, {"old": torch.ones(2)})
    before = path.read_bytes()

    def interrupted(_: Tensor) -> memoryview:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "tensor_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, every_dtype())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The kernel refuses to let a file grow beyond 64 KiB, as it would when the disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files_only")
def test_a_write_that_the_system_refuses_is_an_error_without_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    fact = refusal(lambda: write_shard(path, {"big": torch.zeros(1 << 16)}))
    assert fact == f"cannot write {path}: {os.strerror(errno.EFBIG)}"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    path = tmp_path / "shard.safetensors"
    fact = refusal(lambda: write_shard(path, {"x": torch.zeros(4)}))
    assert fact == f"cannot write {path}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "deeper" / "config.json"
    assert refusal(lambda: files.write_json(path, {})).startswith(f"cannot write {path}: ")
