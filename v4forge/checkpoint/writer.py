"""Safetensors shards and their index, written whole or not at all; a shard that several processes fill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4forge.checkpoint.codec import spec_of
from v4forge.checkpoint.formats import TensorSpec
from v4forge.checkpoint.incoming import INDEX
from v4forge.files import atomic_path, sync, sync_folder, write_json, writing


def header_of(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> tuple[bytes, dict[str, int], int]:
    """A safetensors file's first bytes, where in the file each tensor starts, and the size of the whole.

    The library's own writer orders more than one metadata entry at random, so the header is made here.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **dict(sorted((metadata or {}).items()))}}
    order = sorted(specs, key=lambda n: (-specs[n].item_bytes, n))  # wide types first: all data aligned
    starts, offset = {}, 0
    for name in order:
        spec = specs[name]
        end = offset + spec.bytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        starts[name], offset = offset, end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + offset


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, digest: Any = None
) -> None:
    """Writes a safetensors file, whole or not at all; the same tensors and metadata give the same bytes. A `digest` of
    hashlib gets them, too, on a thread beside the writing."""
    head, starts, _ = header_of({n: spec_of(t) for n, t in tensors.items()}, metadata)
    with atomic_path(path) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor(1, "hash") as hashing:
        parts: Iterator[bytes | memoryview] = chain([head], (tensor_bytes(tensors[name]) for name in starts))
        for part in parts:
            if digest is not None:
                hashing.submit(digest.update, part)
            file.write(part)


class SharedShard:
    """A safetensors file that threads and processes of one file system fill together, a tensor at a time.

    One of them calls `create`, which reserves the space; all may `write` and end with `sync`; then one calls `publish`.
    The bytes are those of `write_shard`, whoever writes what in which order. Raises UserError where the disk is full.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.shared.tmp")
        self._specs = dict(specs)
        self._head, self._starts, self._size = header_of(specs, metadata)
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
                if spec_of(tensor) != self._specs[name]:
                    raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {self._specs[name]}")
                data, offset = tensor_bytes(tensor), self._starts[name]
                while len(data):
                    count = os.pwrite(self._file, data, offset)
                    data, offset = data[count:], offset + count
            sync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def publish(self) -> None:
        """Gives the file its name, once everybody has written."""
        with writing(self.path):
            sync(self._file)
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor of any dtype, on the CPU, without a copy where it lies contiguous there."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def matrix_digest(packed: Tensor, scale: Tensor) -> str:
    """The first 64 bits of the SHA-256 of an INT4 matrix's codes and scales, in hex: what the report keeps of it."""
    digest = hashlib.sha256(tensor_bytes(packed))
    digest.update(tensor_bytes(scale))
    return digest.hexdigest()[:16]


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Writes model.safetensors.index.json: tensor name -> shard."""
    write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)})
