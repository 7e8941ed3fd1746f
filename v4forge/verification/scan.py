"""One pass over an artifact and its source for verify: each byte read once, by all cores, a bounded piece at a time.

It measures and judges nothing: `scan` returns what every tensor is like, and the checks of certificate.py decide.
Nothing here is shared with what wrote the artifact; see independent.py.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.codec import DTYPES
from v4forge.checkpoint.formats import Shape, TensorSpec
from v4forge.checkpoint.prefetch import one_thread_each, open_file, read_into
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import ALIASES, Rule
from v4forge.checkpoint.writer import matrix_digest
from v4forge.digests import Digests
from v4forge.errors import UserError
from v4forge.verification import reference

THREADS = min(64, len(os.sched_getaffinity(0)))
PIECE_BYTES = 64 << 20  # of a tensor that is only compared; with it a thread holds at most about 300 MB
# Matrices of routed experts that a thread has at a time, those of one shape compared as one: a GPU has then fewer and
# larger kernels, while a CPU's temporaries would no longer stay where the last ones were.
TOGETHER = {"cuda": 6, "cpu": 1}
ALIGNMENT = 64  # of a tensor in a thread's room, in bytes


@dataclass(frozen=True)
class Seen:
    """What one tensor, or a piece of one, is like. `fault` says why there is nothing to compare."""

    name: str  # logical
    fault: str = ""  # in the artifact: NaN, a scale of no power of two, a missing part
    source_fault: str = ""
    differences: tuple[str, ...] = ()  # stored tensors that are not what the source says, and how
    stale: tuple[str, ...] = ()  # aliases that are not it
    expert: reference.Matrix | None = None  # of a routed expert's matrix
    digest: str = ""  # of a routed expert's codes and scales, as in the layer report


Pair = tuple[dict[str, Tensor], dict[str, Tensor]]  # a matrix' parts and its source's, which may be empty


@dataclass(frozen=True)
class Piece:
    """What one thread works on at a time: a logical tensor, or elements `start` to `stop` of one stored as it is."""

    name: str
    shape: Shape
    rule: Rule
    start: int = 0
    stop: int = -1  # -1: the whole tensor

    @property
    def is_whole(self) -> bool:
        return self.stop < 0

    @property
    def is_matrix(self) -> bool:
        """Of a routed expert."""
        return self.rule.artifact == "int4"


def pieces(config: layout.Config) -> Iterator[Piece]:
    """All logical tensors, those that are only compared cut into pieces."""
    for name, shape in layout.parameters(config):
        rule, count = config.rule_for(name), math.prod(shape)
        step = PIECE_BYTES // 8
        if (rule.source, rule.artifact) not in reference.ALIKE or count <= step:
            yield Piece(name, shape, rule)
        else:
            yield from (Piece(name, shape, rule, at, min(at + step, count)) for at in range(0, count, step))


class _Room(threading.local):
    """A thread's memory for what it reads, used again for the next piece; pinned for a GPU, which copies from there."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def clear(self) -> None:
        """What was taken is read no more."""
        self._used = 0

    def take(self, size: int) -> Tensor:
        """[size] u8, not initialized."""
        if self._used + size > len(self._buffer):  # who has parts of the old one keeps it
            self._buffer = torch.empty(max(2 * len(self._buffer), 2 * size), dtype=torch.uint8, pin_memory=self._pinned)
            self._used = 0
        taken = self._buffer[self._used : self._used + size]
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return taken


class _Bytes:
    """Stored tensors by positioned reads; safe for any number of threads, each of which has one piece at a time."""

    def __init__(self, checkpoint: Checkpoint, room: _Room) -> None:
        self.checkpoint, self._room = checkpoint, room
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)

    def parts(self, piece: Piece, names: dict[str, TensorSpec]) -> dict[str, Tensor]:
        """part or name -> stored tensor, or the piece of it; without those that the checkpoint does not have."""
        return {name: self._read(name, piece) for name in names if name in self.checkpoint.weight_map}

    def _read(self, name: str, piece: Piece) -> Tensor:
        spec = self.checkpoint.spec(name)
        with self._lock:
            path, offset = self.checkpoint.place(name)
            if path not in self._files:
                self._files[path] = open_file(path)
        size = spec.item_bytes
        start, stop = (0, math.prod(spec.shape)) if piece.is_whole else (piece.start, piece.stop)
        stop = min(stop, math.prod(spec.shape))
        buffer = self._room.take(max(stop - start, 0) * size)
        read_into(self._files[path], path, buffer.numpy().data, offset + start * size)
        tensor = buffer.view(DTYPES[spec.dtype])
        return tensor.view(spec.shape) if piece.is_whole else tensor


@torch.no_grad()
def scan(
    artifact: Checkpoint,
    source: Checkpoint | None,
    digests: Digests | None,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
    device: torch.device = reference.CPU,
) -> list[Seen]:
    """Measures every tensor of the artifact, beside its source where there is one, in the layout's order. `progress`
    gets bytes read, and of how many. With `digests` each shard is hashed beside its first tensors, as it comes into the
    page cache: `digests` then knows them all. The routed experts' matrices are compared on `device`.
    """
    todo = list(pieces(artifact.config))
    sizes = [_size(piece) for piece in todo]
    done, total = 0, sum(sizes)
    seen: dict[int, Seen] = {}
    reference.tables(device)
    room = _Room(pinned=device.type == "cuda")
    with (
        closing(_Bytes(artifact, room)) as ours,
        closing(_Bytes(source or artifact, room)) as theirs,
        one_thread_each(),
        ThreadPoolExecutor(THREADS, "scan", _on_own_stream, (device,)) as pool,
    ):
        first = _first_use(todo, [c for c in (artifact, source) if c]) if digests else {}
        jobs, hashes = {}, []

        def measured(some: Sequence[Piece]) -> list[Seen]:
            room.clear()
            return _all_seen(some, ours, theirs if source else None, digests is not None, device)

        try:
            for numbers in _jobs(todo, TOGETHER[device.type]):
                if digests:  # each by a thread of its own, or a few would wait for the slowest
                    shards = [path for number in numbers for path in first.get(number, ())]
                    hashes += [pool.submit(digests.of, [path]) for path in shards]
                jobs[pool.submit(measured, todo[numbers.start : numbers.stop])] = numbers
            for job in as_completed(jobs):
                numbers = jobs[job]
                seen |= zip(numbers, job.result(), strict=True)
                done += sum(sizes[number] for number in numbers)
                progress(done, total)
            for each in hashes:
                each.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [seen[number] for number in range(len(todo))]


def _on_own_stream(device: torch.device) -> None:
    """Of a thread: what it has a GPU do waits for no other thread's."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # which takes no device without a number
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _size(piece: Piece) -> int:
    """Bytes of the artifact."""
    specs = layout.stored(piece.name, piece.shape, piece.rule.artifact)
    if not piece.is_whole:
        return (piece.stop - piece.start) * next(iter(specs.values())).item_bytes
    return sum(spec.bytes for spec in specs.values())


def _stored(piece: Piece, form: str) -> dict[str, TensorSpec]:
    specs = layout.stored(piece.name, piece.shape, getattr(piece.rule, form))
    if form == "artifact":
        specs |= {alias: specs[original] for alias, original in ALIASES.items() if original == piece.name}
    return specs


def _first_use(todo: list[Piece], checkpoints: list[Checkpoint]) -> dict[int, list[Path]]:
    """number of a piece -> the shards that it is the first to read; those that none reads are the first piece's."""
    first: dict[Path, int] = {}
    for checkpoint in checkpoints:
        for number, piece in enumerate(todo):
            for name in _stored(piece, checkpoint.form):
                if name in checkpoint.weight_map:
                    first.setdefault(checkpoint.directory / checkpoint.weight_map[name], number)
        for shard in checkpoint.shard_names:
            first.setdefault(checkpoint.directory / shard, 0)
    by_number: dict[int, list[Path]] = {}
    for path, number in first.items():
        by_number.setdefault(number, []).append(path)
    return by_number


def _jobs(todo: Sequence[Piece], matrices: int) -> Iterator[range]:
    """Numbers of pieces that one thread has at a time: so many matrices of routed experts, or anything else alone."""
    start = 0
    while start < len(todo):
        stop = start + 1
        while stop < len(todo) and stop - start < matrices and todo[start].is_matrix and todo[stop].is_matrix:
            stop += 1
        yield range(start, stop)
        start = stop


def _all_seen(
    some: Sequence[Piece], ours: _Bytes, theirs: _Bytes | None, hashing: bool, device: torch.device
) -> list[Seen]:
    """Each piece as it is; the matrices among them, of one shape and with a source or without, at a time."""
    pairs: list[Pair | None] = []
    seen = []
    for piece in some:
        each, pair = _seen(piece, ours, theirs, hashing)
        seen.append(each)
        pairs.append(pair)
    by_form: dict[tuple[Shape, bool], list[int]] = {}
    for number, pair in enumerate(pairs):
        if pair is not None:
            by_form.setdefault((some[number].shape, bool(pair[1])), []).append(number)
    for numbers in by_form.values():
        both = [pair for number in numbers if (pair := pairs[number])]
        matrices = reference.all_compared([parts for parts, _ in both], [wanted for _, wanted in both], device)
        for number, matrix in zip(numbers, matrices, strict=True):
            seen[number] = replace(seen[number], expert=matrix)
    return seen


def _seen(piece: Piece, ours: _Bytes, theirs: _Bytes | None, hashing: bool) -> tuple[Seen, Pair | None]:
    """What is to be said of a piece; and of a routed expert's matrix its parts and its source's, to be compared."""
    found: dict[str, Tensor] = {}
    try:
        found = ours.parts(piece, _stored(piece, "artifact"))
        parts = _checked(piece, ours, found, "artifact")
        wrong = reference.fault(piece.rule.artifact, parts, ours.checkpoint.config.n_routed_experts)
    except UserError as error:
        return Seen(piece.name, fault=error.fact), None
    stale = tuple(
        alias
        for alias, original in ALIASES.items()
        if original == piece.name and alias in found and not reference.same_bits(found[alias], found[original])
    )
    fault = f"{piece.name} {wrong}" if wrong else ""
    digest = ""
    if hashing and "weight_packed" in parts:
        digest = matrix_digest(parts["weight_packed"], parts["weight_scale"])
    wanted, source_fault = {}, ""
    if theirs is not None:
        try:
            wanted = _checked(piece, theirs, theirs.parts(piece, _stored(piece, "source")), "source")
        except UserError as error:
            source_fault = error.fact
    if piece.is_matrix:
        return Seen(piece.name, fault, source_fault, digest=digest), (parts, wanted)
    differences: tuple[str, ...] = ()
    if wanted:
        expected = reference.expected(piece.name, piece.rule, wanted)
        differences = tuple(
            f"{stored} differs from the source: {reference.difference(found[stored], tensor, piece.start)}"
            for stored, tensor in expected.items()
            if not reference.same_bits(found[stored], tensor)
        )
    return Seen(piece.name, fault, source_fault, differences, stale, digest=digest), None


def _checked(piece: Piece, bytes_: _Bytes, found: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """part -> tensor; UserError for one that is missing or has another dtype or shape."""
    checkpoint = bytes_.checkpoint
    if piece.is_whole:
        return checkpoint.holding(found).parts(piece.name, piece.shape)
    if piece.name in found:
        checkpoint.check(piece.name, checkpoint.spec(piece.name), _stored(piece, form)[piece.name])
    return {"": checkpoint.holding(found).raw(piece.name)}
