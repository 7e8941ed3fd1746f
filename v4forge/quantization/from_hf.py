"""The artifact from a folder that llm-compressor saved: its experts' INT4 codes and scales, all else of the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4forge import digests
from v4forge.checkpoint import layout
from v4forge.checkpoint.codec import spec_of
from v4forge.checkpoint.conversion import converted
from v4forge.checkpoint.layout import Config
from v4forge.checkpoint.reader import INDEX, Checkpoint
from v4forge.checkpoint.safetensors_header import carries
from v4forge.checkpoint.writer import matrix_digest, write_shard
from v4forge.digests import Digests, cache_of
from v4forge.errors import UserError
from v4forge.quantization import determining, layer_files
from v4forge.quantization.hf_folder import EXPERT_NAMES, QUANTIZE_AGAIN, Foreign, Matrices, matrices, opened
from v4forge.quantization.postprocess import Origin, build, tokenizer_files

DETERMINING = "quantization/from_hf"  # the module whose imports determine the bytes


def exact_scale(scale: Tensor, name: str) -> Tensor:
    """A scale in BF16; UserError where that would change a value. One that is BF16 already is verify's to judge."""
    if scale.dtype == torch.bfloat16:
        return scale
    rounded = scale.to(torch.bfloat16)
    if not torch.equal(rounded.float(), scale.float()):
        fact = f"{name} is {spec_of(scale).dtype} and not exact in BF16, which the artifact has"
        raise UserError(fact, QUANTIZE_AGAIN)
    return rounded


def _check_values(foreign: Foreign, taken: Matrices, config: Config) -> None:
    """Raises UserError for a weight_shape that is not the matrix's, and for a scale that is not exact in BF16."""
    shapes = dict(layout.parameters(config))
    for logical, names in taken.items():
        _, scale, shape = names.values()
        if (stated := foreign.read(shape).tolist()) != list(shapes[logical]):
            raise UserError(f"{shape} is {stated}, config.json asks for {list(shapes[logical])}", QUANTIZE_AGAIN)
        if foreign.spec(scale)[0] != "BF16":
            exact_scale(foreign.read(scale), scale)


def _mark(source: Checkpoint, foreign: Foreign, cache: Path) -> dict[str, Any]:
    """All that determines the bytes of the layers, in the form of layers.fingerprint."""
    paths = [foreign.directory / name for name in sorted({*foreign.shards, INDEX, "config.json"})]
    digests = Digests(cache)
    by_path = digests.of([path for path in paths if path.is_file()])
    digests.save()
    return {
        "source": layer_files.source_digests(source.directory, source.shard_names, cache),
        "from": f"routed experts saved by {foreign.maker}, everything else from the source",
        "files": {path.name: {"sha256": sha, "bytes": path.stat().st_size} for path, sha in by_path.items()},
        "code": {m: layer_files.code_digest(m) for m in determining.modules(DETERMINING)},
    }


def repair(
    source: Checkpoint, folder: Path, out: Path, progress: Callable[[int, str], None] = lambda _done, _what: None
) -> None:
    """Writes the artifact into `out`: the routed experts' codes and scales from `folder`, all else from the source.

    Killed anywhere and run again it gives the same bytes; layers that are done stay. Raises UserError before anything
    is written when the source is not what it must be, or the folder's experts cannot be kept as they are.
    """
    config = source.config
    source.validate(layout.upstream(config))
    tokenizer_files(source.directory)  # before every byte is read for the digests
    foreign = opened(folder)
    taken = matrices(foreign, config)
    _check_values(foreign, taken, config)
    cache = cache_of(out.parent)
    mark = _mark(source, foreign, cache)
    digest = digests.digest_of(mark)

    def place(layer: int, path: Path) -> dict[str, Any]:
        done = carries(path, digest)
        codes: dict[str, list[str]] = {which: [] for which in EXPERT_NAMES}
        tensors: dict[str, Tensor] = {}
        for logical, shape in layout.layer_parameters(config, layer):
            if logical in taken:
                parts = {ours: foreign.read(theirs) for ours, theirs in taken[logical].items()}
                packed, scale, _ = parts
                parts[scale] = exact_scale(parts[scale], scale)
                codes[logical.split(".")[-2]].append(matrix_digest(parts[packed], parts[scale]))
                tensors |= parts
            elif not done:
                tensors |= converted(source, logical, shape)
        if not done:
            write_shard(path, tensors, {"fingerprint": digest})
        return {"layer": layer, "error": {}, "blended": [], "fallback": [], "codes": codes}

    build(source, Origin(folder, mark, place), out, cache, progress)
