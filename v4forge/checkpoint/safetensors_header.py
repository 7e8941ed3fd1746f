"""The header of a safetensors file, read and checked. https://github.com/huggingface/safetensors#format"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Slice:
    """dtype and shape of a tensor, asked for as of safetensors' own slices."""

    dtype: str
    shape: list[int]

    def get_dtype(self) -> str:
        return self.dtype

    def get_shape(self) -> list[int]:
        return self.shape


def read_head(path: Path) -> bytes:
    """The first bytes of a safetensors file: eight that say how long the header is, and the header.

    Raises ValueError where there are fewer, OSError where the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(8)
        size = head_bytes(head)
        head += file.read(size - len(head))
    if len(head) < size:
        raise ValueError("it ends within the header")
    return head


def head_bytes(start: bytes) -> int:
    """How many bytes `read_head` gives of a file that begins so; ValueError where that cannot be."""
    size = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= size <= MAX_HEADER_BYTES:
        raise ValueError("it does not begin with a header")
    return 8 + size


def parsed(head: bytes, size: int | None) -> dict[str, Any]:
    """A shard's header, name -> dtype, shape and data_offsets, checked as safetensors does: the tensors lie one behind
    the other up to the end of the file, which has `size` bytes. Raises ValueError.

    https://github.com/huggingface/safetensors#format
    """
    header = json.loads(head[8:])
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    try:
        spans = sorted(each["data_offsets"] for name, each in header.items() if name != "__metadata__")
        sound = all(
            isinstance(each["dtype"], str) and all(isinstance(n, int) and n >= 0 for n in each["shape"])
            for name, each in header.items()
            if name != "__metadata__"
        )
        ends = [0, *(stop for _, stop in spans)]
        sound = sound and all(start == before <= stop for (start, stop), before in zip(spans, ends, strict=False))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError("its header describes no row of tensors")
    if size is not None and len(head) + ends[-1] != size:
        raise ValueError(f"its header describes {len(head) + ends[-1]} bytes, it has {size}")
    return header


def carries(path: Path, fingerprint: str) -> bool:
    """Whether a safetensors file is there, whole, and of the run with this fingerprint."""
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("fingerprint") == fingerprint
    except (OSError, SafetensorError):
        return False
