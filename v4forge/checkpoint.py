"""Sharded safetensors checkpoints: a reader over the index that checks before it reads, and an atomic shard writer.

Shards that a living fetch has yet to bring are known by their headers; reading one of their tensors waits (`arriving`).
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4forge import arriving
from v4forge.arriving import INDEX
from v4forge.codec import FORMATS, CodecError
from v4forge.errors import UserError
from v4forge.files import atomic_path, sync_folder, write_json, writing
from v4forge.layout import Config, TensorSpec, load_config, stored_name
from v4forge.recipe import rule_for

# Names of the safetensors format, https://github.com/huggingface/safetensors#format
DTYPES = {
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INTEGER_TABLES = (torch.int32, torch.int64)  # tid2eid keeps whichever its source has


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """A safetensors file's first bytes, where in the file each tensor starts, and the size of the whole.

    The library's own writer orders more than one metadata entry at random, so the header is made here.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted((metadata or {}).items()))}}
    order = sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n))  # wide types first: all data aligned
    starts, offset = {}, 0
    for name in order:
        dtype, shape = specs[name].dtype, specs[name].shape
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        starts[name], offset = offset, end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + offset


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all; the same tensors and metadata give the same bytes."""
    head, starts, _ = _header({n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}, metadata)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(head)
        for name in starts:
            file.write(tensor_bytes(tensors[name]))


class SharedShard:
    """A safetensors file that threads and processes of one file system fill together, a tensor at a time.

    One of them calls `create`, which reserves the space; all may `write` and end with `sync`; then one calls `publish`.
    The bytes are those of `write_shard`, whoever writes what in which order. Raises UserError where the disk is full.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.shared.tmp")
        self._specs = dict(specs)
        self._head, self._starts, self._size = _header(specs, metadata)
        self._file = -1

    def create(self) -> None:
        """Makes the file under its temporary name, with its header, at its full size."""
        with writing(self.path):
            self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.posix_fallocate(self._file, 0, self._size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(self._file, self._size)
            os.pwrite(self._file, self._head, 0)

    def open(self) -> None:
        """Opens the file that another process has created."""
        with writing(self.path):
            if self._file < 0:
                self._file = os.open(self._temporary, os.O_RDWR)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors in their places and waits until the disk has them."""
        with writing(self.path):
            for name, tensor in tensors.items():
                if TensorSpec(tensor.dtype, tuple(tensor.shape)) != self._specs[name]:
                    raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {self._specs[name]}")
                data, offset = tensor_bytes(tensor), self._starts[name]
                while len(data):
                    count = os.pwrite(self._file, data, offset)
                    data, offset = data[count:], offset + count
            os.fdatasync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def publish(self) -> None:
        """Gives the file its name, once everybody has written."""
        with writing(self.path):
            os.fsync(self._file)
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor of any dtype, on the CPU, without a copy where it lies contiguous there."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Writes model.safetensors.index.json: tensor name -> shard."""
    write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)})


def carries(path: Path, fingerprint: str) -> bool:
    """Whether a safetensors file is there, whole, and of the run with this fingerprint."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("fingerprint") == fingerprint
    except (OSError, SafetensorError):
        return False


class Checkpoint:
    """A folder of safetensors shards under one index. Opening it reads headers only.

    `form` is "source" (upstream FP4/FP8) or "artifact"; it picks the column of the recipe by which `load` decodes.
    While fetch fills the folder, opening waits until what there will be is known; `by_fetch`: fetch itself opens it.
    Raises UserError for a missing index or shard, a truncated shard, or an index that disagrees with the shards.
    """

    def __init__(self, directory: Path, form: str = "source", by_fetch: bool = False) -> None:
        self.directory = Path(directory)
        self.form = form
        self._hint = {
            "source": f"restore the file in {self.directory}; make fetch PROFILE=flash brings what is missing there",
            "artifact": f"make it again: python -m scripts.postprocess --out {self.directory} …",
        }[form]
        if not by_fetch:  # index and headers may still be those of an earlier revision
            arriving.wait_until_ready(self.directory)
        try:
            self.weight_map: dict[str, str] = json.loads((self.directory / INDEX).read_text())["weight_map"]
            if not all(s == Path(s).name and s.endswith(".safetensors") for s in self.weight_map.values()):
                raise ValueError("a shard outside the folder")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.directory / INDEX} does not exist", self._hint) from None
        except OSError as error:
            raise UserError(f"{self.directory / INDEX} cannot be read: {error.strerror}", self._hint) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self.directory / INDEX} is not a safetensors index", self._hint) from None
        self._shards = {shard: self._open(shard) for shard in sorted(set(self.weight_map.values()))}
        self._coming = {shard for shard, file in self._shards.items() if isinstance(file, arriving.Shard)}
        self._held: Mapping[str, Tensor] = {}
        self._places: dict[str, dict[str, Any]] = {}
        self._names = {shard: set(file.keys()) for shard, file in self._shards.items()}
        for name, shard in self.weight_map.items():
            if name not in self._names[shard]:
                raise UserError(f"{name} is not in {shard}, where the index has it", self._hint)
        for shard, names in self._names.items():
            if extra := sorted(n for n in names if self.weight_map.get(n) != shard):
                raise UserError(f"{shard} holds {extra[0]}, which the index does not have there", self._hint)

    def _open(self, shard: str) -> Any:
        path = self.directory / shard
        try:
            return arriving.Shard(path) if arriving.is_coming(path) else safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing", self._hint) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"shard {path} is truncated or not safetensors ({error})", self._hint) from None

    @cached_property
    def config(self) -> Config:
        """The checked config.json beside the shards."""
        return load_config(self.directory)

    @property
    def shard_names(self) -> list[str]:
        return list(self._shards)

    def metadata(self, shard: str) -> dict[str, str]:
        return self._shards[shard].metadata() or {}

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape from the shard's header; KeyError when there is no such tensor."""
        piece = self._shards[self.weight_map[name]].get_slice(name)
        dtype = piece.get_dtype()
        if dtype not in DTYPES:
            raise UserError(f"{name} in {self.directory} has dtype {dtype}, which no DeepSeek-V4 file uses", self._hint)
        return TensorSpec(DTYPES[dtype], tuple(piece.get_shape()))

    def place(self, name: str) -> tuple[str, int]:
        """The shard that holds a stored tensor, and at which byte of it the tensor starts."""
        shard = self.weight_map[name]
        path = self.directory / shard
        if shard not in self._places:
            try:
                head = arriving.read_head(arriving.with_header(path))
                self._places[shard] = json.loads(head[8:]) | {"": len(head)}
            except (OSError, ValueError) as error:
                raise UserError(f"shard {path} cannot be read: {error}", self._hint) from None
        header = self._places[shard]
        return str(path), header[""] + header[name]["data_offsets"][0]

    def arrived(self, names: Iterable[str], given_up: Callable[[], bool]) -> bool:
        """Waits for every shard of the blocks (a layer, the MTP block, the root) that these tensors belong to; False
        when `given_up` says so. Raises UserError when a shard is missing and no fetch lives.

        By blocks and not by tensors, so that all ranks wait for the same and none in a collective for another's shard.
        """
        if not self._coming:
            return True
        blocks = set(map(_block, names))
        needed = {shard for block in blocks for shard in self._block_shards[block]}
        for shard in sorted(needed & self._coming):
            if not arriving.wait_for(self.directory / shard, given_up):
                return False
            self._coming.discard(shard)
        return True

    @cached_property
    def _block_shards(self) -> dict[str, set[str]]:
        """By block, the shards that hold its tensors."""
        found: dict[str, set[str]] = {}
        for name, shard in self.weight_map.items():
            found.setdefault(_block(name), set()).add(shard)
        return found

    def holding(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """The same checkpoint with some stored tensors already read: `raw` returns these."""
        other = copy(self)
        other._held = tensors
        return other

    def raw(self, name: str) -> Tensor:
        """A stored tensor as it is; raises UserError when it is missing."""
        if name in self._held:
            return self._held[name]
        if name not in self.weight_map:
            raise UserError(f"tensor {name} is missing from {self.directory}", self._hint)
        return self._shards[self.weight_map[name]].get_tensor(name)

    def parts(self, logical: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The stored tensors of a logical one by part name, checked by dtype and shape."""
        wanted = FORMATS[getattr(rule_for(logical), self.form)].parts(shape)
        parts = {}
        for part, (dtype, part_shape) in wanted.items():
            name = stored_name(logical, part)
            tensor = self.raw(name)
            self.check(name, TensorSpec(tensor.dtype, tuple(tensor.shape)), TensorSpec(dtype, part_shape))
            parts[part] = tensor
        return parts

    def check(self, name: str, found: TensorSpec, expected: TensorSpec) -> None:
        """Raises UserError when a stored tensor is not what the layout asks for."""
        if not matches(found, expected):
            raise UserError(
                f"{name} is {DTYPE_NAMES[found.dtype]} {list(found.shape)}, config.json asks for"
                f" {DTYPE_NAMES[expected.dtype]} {list(expected.shape)}",
                "use the config.json that belongs to these shards",
            )

    def load(self, logical: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """A logical tensor on `device`: quantized formats decoded to BF16 exactly, the others as stored.

        Raises UserError, naming the tensor, for a missing part and for what `decoded` refuses.
        """
        return self.decoded(logical, {k: v.to(device) for k, v in self.parts(logical, shape).items()})

    def decoded(self, logical: str, parts: Mapping[str, Tensor]) -> Tensor:
        """What `load` returns; UserError for NaN or Inf, a scale outside BF16's range, or an expert out of range."""
        decode = FORMATS[getattr(rule_for(logical), self.form)].decode
        try:
            tensor = decode(*parts.values())
        except CodecError as error:
            raise UserError(f"{logical}: {error}", self._hint) from None
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{logical} holds NaN or Inf", self._hint)
        if rule_for(logical).source == "int":
            experts = self.config.n_routed_experts
            if (bad := tensor[(tensor < 0) | (tensor >= experts)]).numel():
                raise UserError(f"{logical} routes to expert {int(bad[0])}, there are 0 to {experts - 1}", self._hint)
        return tensor

    def validate(self, expected: Mapping[str, TensorSpec]) -> None:
        """Raises UserError for the first missing, unknown or wrongly shaped tensor; reads headers only."""
        missing = next((n for n in expected if n not in self.weight_map), None)
        if missing is not None:
            what = "the MTP block is missing: no tensor" if missing.startswith("mtp.") else "no tensor"
            raise UserError(f"{what} {missing} in {self.directory}", self._hint)
        unknown = next((n for n in sorted(self.weight_map) if n not in expected), None)
        if unknown is not None:
            raise UserError(
                f"{self.weight_map[unknown]} holds {unknown}, which DeepSeek-V4 with this config.json does not have",
                "use the config.json that belongs to these shards, and the first release of DeepSeek-V4-Flash",
            )
        for name, spec in expected.items():
            self.check(name, self.spec(name), spec)


def _block(name: str) -> str:
    """`layers.3` or `mtp.0` of a tensor's name, '' for the root's."""
    parts = name.split(".", 2)
    return ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else ""


def matches(found: TensorSpec, expected: TensorSpec) -> bool:
    """Whether a stored tensor is what the layout asks for; an integer table may have either width."""
    if expected.dtype == torch.int64 and len(expected.shape) == 2:
        return found.shape == expected.shape and found.dtype in INTEGER_TABLES
    return found == expected
