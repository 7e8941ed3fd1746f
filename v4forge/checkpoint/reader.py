"""Sharded safetensors checkpoints: a reader over the index that checks before it reads.

Shards that a living fetch has yet to bring are known by their headers; reading one of their tensors waits (`incoming`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from v4forge.checkpoint import incoming, safetensors_header
from v4forge.checkpoint.codec import DECODERS, CodecError, spec_of
from v4forge.checkpoint.formats import ITEM_BYTES, PARTS, TensorSpec
from v4forge.checkpoint.incoming import INDEX
from v4forge.checkpoint.layout import Config, load_config, stored_name
from v4forge.errors import UserError
from v4forge.files import check_no_pointer

INTEGER_TABLES = ("I32", "I64")  # tid2eid keeps whichever its source has


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
            incoming.wait_until_ready(self.directory)
        try:
            self.weight_map: dict[str, str] = json.loads((self.directory / INDEX).read_text())["weight_map"]
            if not all(s == Path(s).name and s.endswith(".safetensors") for s in self.weight_map.values()):
                raise ValueError("a shard outside the folder")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.directory / INDEX} does not exist", self._hint) from None
        except OSError as error:
            raise UserError(f"{self.directory / INDEX} cannot be read: {error.strerror}", self._hint) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            check_no_pointer(self.directory / INDEX)
            raise UserError(f"{self.directory / INDEX} is not a safetensors index", self._hint) from None
        self._shards = {shard: self._open(shard) for shard in sorted(set(self.weight_map.values()))}
        self._coming = {shard for shard, file in self._shards.items() if isinstance(file, incoming.Shard)}
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
            return incoming.Shard(path) if incoming.is_coming(path) else safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing", self._hint) from None
        except (SafetensorError, OSError, ValueError) as error:
            check_no_pointer(path)
            raise UserError(f"shard {path} is truncated or not safetensors ({error})", self._hint) from None

    @cached_property
    def config(self) -> Config:
        """The checked config.json beside the shards."""
        return load_config(self.directory, self.form)

    def made_by(self, recipe: str) -> Checkpoint:
        """The same source, of which the artifact of this recipe is made; a key of RECIPES."""
        other = copy(self)
        other.config = replace(self.config, recipe=recipe)
        return other

    def format_of(self, logical: str) -> str:
        """The format, a key of PARTS, in which a logical tensor is stored here."""
        rule = self.config.rule_for(logical)
        return rule.source if self.form == "source" else rule.artifact

    @property
    def shard_names(self) -> list[str]:
        return list(self._shards)

    def metadata(self, shard: str) -> dict[str, str]:
        return self._shards[shard].metadata() or {}

    def spec(self, name: str) -> TensorSpec:
        """dtype and shape from the shard's header; KeyError when there is no such tensor."""
        piece = self._shards[self.weight_map[name]].get_slice(name)
        dtype = piece.get_dtype()
        if dtype not in ITEM_BYTES:
            raise UserError(f"{name} in {self.directory} has dtype {dtype}, which no DeepSeek-V4 file uses", self._hint)
        return TensorSpec(dtype, tuple(piece.get_shape()))

    def place(self, name: str) -> tuple[str, int]:
        """The shard that holds a stored tensor, and at which byte of it the tensor starts."""
        shard = self.weight_map[name]
        path = self.directory / shard
        if shard not in self._places:
            try:
                head = safetensors_header.read_head(incoming.with_header(path))
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
            if not incoming.wait_for(self.directory / shard, given_up):
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
        self.config  # noqa: B018, read once and not by each of many views
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
        parts = {}
        for part, spec in PARTS[self.format_of(logical)](shape).items():
            name = stored_name(logical, part)
            tensor = self.raw(name)
            self.check(name, spec_of(tensor), spec)
            parts[part] = tensor
        return parts

    def check(self, name: str, found: TensorSpec, expected: TensorSpec) -> None:
        """Raises UserError when a stored tensor is not what the layout asks for."""
        if not matches(found, expected):
            raise UserError(
                f"{name} is {found.dtype} {list(found.shape)}, config.json asks for"
                f" {expected.dtype} {list(expected.shape)}",
                "use the config.json that belongs to these shards",
            )

    def load(self, logical: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
        """A logical tensor on `device`: quantized formats decoded to BF16 exactly, the others as stored.

        Raises UserError, naming the tensor, for a missing part and for what `decoded` refuses.
        """
        return self.decoded(logical, {k: v.to(device) for k, v in self.parts(logical, shape).items()})

    def decoded(self, logical: str, parts: Mapping[str, Tensor]) -> Tensor:
        """What `load` returns; UserError for NaN or Inf, a scale outside BF16's range, or an expert out of range."""
        decode = DECODERS[self.format_of(logical)]
        try:
            tensor = decode(*parts.values())
        except CodecError as error:
            raise UserError(f"{logical}: {error}", self._hint) from None
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{logical} holds NaN or Inf", self._hint)
        if self.format_of(logical) == "int":
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
    if expected.dtype == "I64" and len(expected.shape) == 2:
        return found.shape == expected.shape and found.dtype in INTEGER_TABLES
    return found == expected
