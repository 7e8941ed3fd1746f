"""Upstream to BF16 with the MTP block kept, for other tools: same names, `.scale` gone, other tensors as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from v4forge.checkpoint import layout
from v4forge.checkpoint.codec import spec_of
from v4forge.checkpoint.formats import TensorSpec
from v4forge.checkpoint.reader import INDEX, Checkpoint, matches
from v4forge.checkpoint.recipe import rule_for
from v4forge.checkpoint.writer import write_index, write_shard
from v4forge.files import write_json
from v4forge.quantization.postprocess import claim_output, copy, tokenizer_files


def expected(config: layout.Config) -> dict[str, TensorSpec]:
    """Every tensor of the BF16 checkpoint: FP4 and FP8 weights in BF16, the rest as upstream."""
    specs: dict[str, TensorSpec] = {}
    for name, shape in layout.parameters(config):
        rule = rule_for(name)
        plain = "bf16" if rule.source in ("fp4", "fp8") else rule.source
        specs |= layout.stored(name, shape, plain)
    return specs


def _whole(path: Path, names: set[str], mark: str) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("source") == mark and set(file.keys()) == names
    except (OSError, SafetensorError):
        return False


def dequantize(
    source: Checkpoint, out: Path, mark: str, progress: Callable[[int, str], None] = lambda _done, _what: None
) -> None:
    """Writes one shard a layer, one for the root and one for the MTP block, then index and config.json.

    `mark` names the source's content; shards in `out` that carry it are kept, so that a killed run continues. Raises
    UserError, naming the tensor, before or at the first one that does not decode exactly.
    """
    config = source.config
    source.validate(layout.upstream(config))
    groups = [list(layout.layer_parameters(config, i)) for i in config.layers]
    groups += [list(layout.root_parameters(config)), list(layout.mtp_parameters(config))]
    names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    side_files = tokenizer_files(source.directory)
    claim_output(out, (source.directory,), {*names, *(path.name for path in side_files), INDEX, "config.json"})
    specs = expected(config)
    for done, (name, group) in enumerate(zip(names, groups, strict=True)):
        progress(done, "decoding")
        if _whole(out / name, {n for n, _ in group}, mark):
            continue
        tensors = {n: source.load(n, shape) for n, shape in group}
        assert all(matches(spec_of(t), specs[n]) for n, t in tensors.items())
        write_shard(out / name, tensors, {"source": mark})
        del tensors
    weight_map = {n: name for name, group in zip(names, groups, strict=True) for n, _ in group}
    write_index(out, weight_map, sum(spec.bytes for spec in specs.values()))
    # expert_dtype says "fp4", which is no longer true
    plain = {k: v for k, v in config.raw.items() if k not in ("quantization_config", "expert_dtype")}
    write_json(out / "config.json", plain | {"torch_dtype": str(torch.bfloat16).removeprefix("torch.")})
    for path in side_files:
        copy(path, out / path.name)
