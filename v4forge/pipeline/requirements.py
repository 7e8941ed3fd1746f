"""What a run needs before it starts, from config.json alone: bytes on disk stage by stage, memory, and time a layer."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4forge.checkpoint import layout
from v4forge.checkpoint.formats import Shape, TensorSpec
from v4forge.checkpoint.layout import COMPRESS_RATIOS, Config, load_config
from v4forge.checkpoint.recipe import ALIASES
from v4forge.errors import UserError
from v4forge.quantization.layer_files import HIDDEN_STATES, Settings, layer_file
from v4forge.units import GB

# config.json of deepseek-ai/DeepSeek-V4-Flash's first release
FLASH_CONFIG = Path(__file__).with_name("flash_config.json")
BF16_BYTES = 2
INDEXED = 4  # tokens to a compressed key that the indexer scores
KEEP_EVERY = 8  # layers from one set of hidden states on disk to the next, as calibrate does by default
WORKING_SET_BYTES = 26 << 30  # of a GPU, besides a layer's activations
LOGITS_BYTES = 14 << 24  # of attention at a time: model.attention.LOGITS, thrice in f32 and once in bf16
SCORES_BYTES = 8 << 26  # of the indexer at a time: model.indexer.SCORES, twice in f32
PROCESS_BYTES = 4 << 30  # of the host for a process: Python, torch, the CUDA context


def flash_config() -> Config:
    """DeepSeek-V4-Flash's published config."""
    return layout.parse_config(json.loads(FLASH_CONFIG.read_text()), str(FLASH_CONFIG))


def layer_bytes(by_shard: Mapping[str, int]) -> int:
    """Bytes of all decoder layers together."""
    return sum(size for shard, size in by_shard.items() if shard.startswith("layers."))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint in both forms, by shard of the artifact: "layers.N", "mtp", or "root" with the aliases."""

    upstream: Counter[str]
    artifact: Counter[str]


def sizes_of(config: Config) -> Sizes:
    """The sizes that the layout of upstream and of the artifact give. Layers of one kind have one size."""
    upstream: Counter[str] = Counter()
    artifact: Counter[str] = Counter()
    groups = {"root": layout.root_parameters(config), "mtp": layout.mtp_parameters(config)}
    for shard, parameters in groups.items():
        upstream[shard], artifact[shard] = stored_bytes(config, parameters)
    shapes = dict(layout.root_parameters(config))
    for original in ALIASES.values():
        artifact["root"] += spec_bytes(layout.stored(original, shapes[original], config.rule_for(original).artifact))
    kinds: dict[tuple[int, bool], tuple[int, int]] = {}
    for layer in config.layers:
        kind = config.compress_ratios[layer], layer < config.num_hash_layers
        if kind not in kinds:
            kinds[kind] = stored_bytes(config, layout.layer_parameters(config, layer))
        upstream[f"layers.{layer}"], artifact[f"layers.{layer}"] = kinds[kind]
    return Sizes(upstream, artifact)


def stored_bytes(config: Config, parameters: Iterable[tuple[str, Shape]]) -> tuple[int, int]:
    """Bytes of logical tensors upstream, and in the artifact."""
    upstream = artifact = 0
    for name, shape in parameters:
        rule = config.rule_for(name)
        upstream += spec_bytes(layout.stored(name, shape, rule.source))
        artifact += spec_bytes(layout.stored(name, shape, rule.artifact))
    return upstream, artifact


def spec_bytes(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of stored tensors, without headers."""
    return sum(spec.bytes for spec in specs.values())


def config_of(source: Path) -> Config:
    """The config of a source, DeepSeek-V4-Flash's published one where it has none yet."""
    return load_config(source) if (source / "config.json").is_file() else flash_config()


def has_flash_layers(config: Config) -> bool:
    """Whether a layer is as large as DeepSeek-V4-Flash's, however many there are."""
    flash, own = ({**vars(each)} for each in (flash_config(), config))
    for free in ("raw", "num_hidden_layers", "compress_ratios", "num_hash_layers", "vocab_size", "recipe"):
        del flash[free], own[free]
    return flash == own


def attention_of(config: Config, layer: int) -> str:
    """Its kind, as a layer's report calls it."""
    return COMPRESS_RATIOS[config.compress_ratios[layer]]


def missing_layers(config: Config, folder: Path) -> list[int]:
    """The layers whose files are not in calibrate's folder. Whether those that are still count, calibrate finds out."""
    return [layer for layer in config.layers if not layer_file(folder, layer).is_file()]


def arrived_bytes(upstream: Path) -> int:
    """Bytes of a download's shards, whole ones and parts."""
    return _present_bytes([*upstream.glob("*.safetensors"), *upstream.glob(".fetch/incoming/**/*")])


def streams_bytes(config: Config, samples: int, seq_len: int) -> int:
    """The hidden states between two layers, [samples, seq_len, hc_mult, hidden] bf16."""
    return samples * seq_len * config.hc_mult * config.hidden_size * BF16_BYTES


@dataclass(frozen=True)
class Part:
    """A part of what a run writes: where, what, its bytes when whole, and how many of them are there already."""

    folder: str
    holds: str
    whole_bytes: int
    present_bytes: int = 0

    @property
    def missing_bytes(self) -> int:
        return max(0, self.whole_bytes - self.present_bytes)


def calibration_parts(config: Config, folder: Path | None, samples: int, seq_len: int) -> list[Part]:
    """What calibrate writes into its `--work`, `folder`; no samples where no hidden states are kept."""
    finished = [layer_file(folder, i) for i in config.layers] if folder else []
    whole = layer_bytes(sizes_of(config).artifact)
    return [
        Part("layers", f"{config.num_hidden_layers} finished layers", whole, _present_bytes(finished)),
        Part(
            "layers",
            "hidden states, old and new",
            2 * streams_bytes(config, samples, seq_len),
            _kept_bytes(folder) if folder else 0,
        ),
    ]


def _kept_bytes(folder: Path) -> int:
    """Hidden states that an interrupted calibration has left."""
    return _present_bytes([*(folder / HIDDEN_STATES).glob("layer-*/*.safetensors")])


def _present_bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file())


def free_bytes(work: Path) -> int:
    """Free space of the file system on which `work` lies or would be made."""
    existing = next(path for path in (work.absolute(), *work.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_space(parts: Sequence[Part], work: Path) -> None:
    """Raises UserError, with how much is missing, when what `parts` still lack does not fit where `work` lies."""
    require_room(sum(part.missing_bytes for part in parts), work)


def require_room(needed: int, work: Path) -> None:
    """Raises UserError, with how much is missing, when so many more bytes do not fit where `work` lies."""
    free = free_bytes(work)
    if needed > free:
        raise UserError(
            f"{work} has {free / GB:,.1f} GB free, the run writes {needed / GB:,.1f} GB:"
            f" {(needed - free) / GB:,.1f} GB are missing",
            "make … SCRATCH=<a folder on a larger disk>; without make, --work",
        )


@dataclass(frozen=True)
class Step:
    """What a stage does to the disk. there: what of its output is there; writes_bytes: what it still writes and leaves;
    held_bytes: what of the run lies on the disk while it runs, at most."""

    stage: str
    there: str
    writes_bytes: int
    held_bytes: int


@dataclass(frozen=True)
class _Output:
    """Of a stage: bytes that it leaves, those that are there, how that is said, and bytes that it needs meanwhile, with
    those of them that are there."""

    whole: int = 0
    present: int = 0
    there: str = ""
    meanwhile: int = 0
    meanwhile_present: int = 0


def steps(names: Sequence[str], config: Config, sizes: Sizes, values: Mapping[str, Any]) -> list[Step]:
    """The stages with what they write, in order. `values`: the runner's settings. The artifacts' layers are hard links,
    so they count where calibrate writes them. Data sets, caches and reports are not in it."""
    held = 0
    found = []
    for name in names:
        output = _output(name, config, sizes, values)
        found.append(
            Step(name, output.there, max(0, output.whole - output.present), held + output.whole + output.meanwhile)
        )
        held += output.whole
    return found


def room_needed(
    steps: Sequence[Step], names: Sequence[str], config: Config, sizes: Sizes, values: Mapping[str, Any]
) -> int:
    """Free bytes that the run needs: what it holds at its peak, without what is there already."""
    outputs = [_output(name, config, sizes, values) for name in names]
    present = sum(output.present + output.meanwhile_present for output in outputs)
    return max(0, max(step.held_bytes for step in steps) - present)


def _output(name: str, config: Config, sizes: Sizes, values: Mapping[str, Any]) -> _Output:
    work = Path(values["work"])
    if name == "fetch":
        if values["source"] != f"{values['work']}/upstream":
            return _Output(there="not needed")
        whole, present = sizes.upstream.total(), arrived_bytes(work / "upstream")
        return _Output(whole, min(whole, present), f"{present / GB:,.1f} GB" if present else "")
    if name in ("calibrate", "rtn"):
        folder = work / ("layers" if name == "calibrate" else "layers-rtn")
        files = [layer_file(folder, layer) for layer in config.layers]
        count = len(files) - len(missing_layers(config, folder))
        there = f"{count}/{len(files)} layers" if count else ""
        # Hidden states are kept to resume from; the new ones are whole before the old ones go.
        kept = 2 * streams_bytes(config, values["samples"], values["seq_len"])
        if name == "rtn" or count == len(files):
            kept = 0
        return _Output(layer_bytes(sizes.artifact), _present_bytes(files), there, kept, min(kept, _kept_bytes(folder)))
    if name in ("postprocess", "postprocess-rtn"):
        folder = work / ("artifact" if name == "postprocess" else "artifact-rtn")
        total = config.num_hidden_layers + 2
        own = [folder / f"model-{number:05}-of-{total:05}.safetensors" for number in (total - 1, total)]
        present = _present_bytes(own)
        return _Output(sizes.artifact.total() - layer_bytes(sizes.artifact), present, "its shards" if present else "")
    return _Output()


def gpu_bytes(config: Config, samples: int, seq_len: int) -> int:
    """Memory of a GPU that has `samples` samples: what it holds throughout, and the larger of what attention needs and
    what the experts need, at whose end their outputs are there. tokens = samples * seq_len; in bytes:

    carried streams  tokens * hc_mult * hidden * 2
    x and shared     2 * tokens * hidden * 2
    attention        attention_bytes
    experts          tokens * top_k * hidden * 2 + 26 * 2^30, the working set
    """
    one = samples * seq_len * config.hidden_size * BF16_BYTES
    experts = config.num_experts_per_tok * one + WORKING_SET_BYTES
    return streams_bytes(config, samples, seq_len) + 2 * one + max(attention_bytes(config, seq_len), experts)


def attention_bytes(config: Config, seq_len: int) -> int:
    """What a forward pass of a micro-batch holds in its attention, at most. tokens = those of the pass, compressed =
    seq_len / 4, picked = the smaller of compressed and index_topk; in bytes:

    queries   tokens * heads * head_dim * 10, once in bf16 and twice in f32, for their norm
    indexer   tokens * index_heads * index_head_dim * 10, its queries, and 8 * 2^26, its scores, where it chooses
    picked    tokens * picked * 24, their numbers thrice
    masks     tokens * compressed * 8
    logits    14 * 2^24, without the kernel of a GPU

    Nothing grows with the square of seq_len but numbers and masks of compressed keys. Derived from the layer classes;
    a test holds it to what torch allocates on a CPU.
    """
    tokens = Settings().micro_batch(seq_len) * seq_len
    compressed = seq_len // INDEXED
    picked = min(compressed, config.forward["index_topk"])
    queries = tokens * config.num_attention_heads * config.head_dim * 10
    indexer = tokens * config.index_n_heads * config.index_head_dim * 10 + SCORES_BYTES
    return queries + (indexer if compressed > picked else 0) + tokens * (24 * picked + 8 * compressed) + LOGITS_BYTES


def host_bytes(config: Config, sizes: Sizes, samples: int, seq_len: int, gpus: int) -> int:
    """Memory of the host: 4 * 2^30 a process, one a GPU, and the larger of the artifact's largest shard and the hidden
    states, which lie there while they are written."""
    written = max(*sizes.artifact.values(), streams_bytes(config, samples, seq_len))
    return gpus * PROCESS_BYTES + written


@dataclass(frozen=True)
class LayerTime:
    """Of calibrating one decoder layer, the mean of all. Reading ahead and writing behind overlap with computing."""

    layers: int
    read_bytes: int  # upstream
    write_bytes: int  # finished layer, and its part of the hidden states
    read_s: float
    write_s: float
    compute_s: float

    @property
    def disk_s(self) -> float:
        """Reading and writing share the disk."""
        return self.read_s + self.write_s

    @property
    def layer_s(self) -> float:
        return max(self.disk_s, self.compute_s)


def layer_time(
    config: Config, sizes: Sizes, samples: int, seq_len: int, read_gbps: float, write_gbps: float, compute_s: float
) -> LayerTime:
    """The time of a layer that takes `compute_s` on the GPUs, with a disk of these speeds, in 10^9 bytes a second."""
    layers = config.num_hidden_layers
    read = layer_bytes(sizes.upstream) // layers
    written = layer_bytes(sizes.artifact) // layers + streams_bytes(config, samples, seq_len) // KEEP_EVERY
    return LayerTime(layers, read, written, read / read_gbps / GB, written / write_gbps / GB, compute_s)
