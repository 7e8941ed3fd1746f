"""What a run needs before it starts, from config.json alone: bytes on disk by folder, memory, and time a layer."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from v4forge import layout
from v4forge.errors import UserError
from v4forge.layers import layer_file
from v4forge.layout import Config, TensorSpec
from v4forge.recipe import ALIASES

# config.json of deepseek-ai/DeepSeek-V4-Flash's first release
FLASH_CONFIG = Path(__file__).with_name("flash_config.json")
BF16_BYTES = 2
KEEP_EVERY = 8  # layers from one set of hidden states on disk to the next, as calibrate does by default
WORKING_SET_BYTES = 26 << 30  # of a GPU, besides a layer's activations
PROCESS_BYTES = 4 << 30  # of the host for a process: Python, torch, the CUDA context


def flash_config() -> Config:
    """DeepSeek-V4-Flash's published config."""
    return layout.parse_config(json.loads(FLASH_CONFIG.read_text()), str(FLASH_CONFIG))


def shard_of(name: str) -> str:
    """Which shard of the artifact holds a stored tensor: "layers.N", "mtp", or "root", which the aliases belong to."""
    parts = name.split(".")
    if parts[0] == "layers":
        return f"layers.{parts[1]}"
    return "mtp" if parts[0] == "mtp" and name not in ALIASES else "root"


def bytes_by_shard(specs: Mapping[str, TensorSpec]) -> Counter[str]:
    """shard_of's names -> bytes of their tensors, without headers."""
    sizes: Counter[str] = Counter()
    for name, spec in specs.items():
        sizes[shard_of(name)] += math.prod(spec.shape) * spec.dtype.itemsize
    return sizes


def layer_bytes(by_shard: Mapping[str, int]) -> int:
    """Bytes of all decoder layers together."""
    return sum(size for shard, size in by_shard.items() if shard.startswith("layers."))


@dataclass(frozen=True)
class Sizes:
    """Bytes of a checkpoint by shard_of's names, in both forms."""

    upstream: Counter[str]
    artifact: Counter[str]


def sizes_of(config: Config) -> Sizes:
    """The sizes that the layout of upstream and of the artifact give."""
    return Sizes(bytes_by_shard(layout.upstream(config)), bytes_by_shard(layout.artifact(config)))


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


def disk_parts(
    config: Config, sizes: Sizes, samples: int, seq_len: int, source: Path | None, work: Path | None
) -> list[Part]:
    """What lies on disk at the worst moment. `source` is the upstream checkpoint, complete or still to be downloaded;
    `work` holds `layers` and `artifact`, and `upstream` when there is no `source`.

    Only file sizes are looked at. The artifact's layers are hard links to `layers`: its own are the root and the MTP
    block. Hidden states are kept for resuming; the new ones are whole before the old ones go.
    """
    upstream = source or (work / "upstream" if work else None)
    shards = list(upstream.glob("*.safetensors")) if upstream else []
    return [
        Part(str(source or "upstream"), "the source", sizes.upstream.total(), _present_bytes(shards)),
        *calibration_parts(config, work / "layers" if work else None, samples, seq_len),
        Part("artifact", "root and MTP block; links to layers", sizes.artifact.total() - layer_bytes(sizes.artifact)),
    ]


def calibration_parts(config: Config, folder: Path | None, samples: int, seq_len: int) -> list[Part]:
    """What calibrate writes into its `--work`, `folder`; no samples where no hidden states are kept."""
    finished = [layer_file(folder, i) for i in config.layers] if folder else []
    whole = layer_bytes(bytes_by_shard(layout.artifact(config)))
    return [
        Part("layers", f"{config.num_hidden_layers} finished layers", whole, _present_bytes(finished)),
        Part("layers", "hidden states, old and new", 2 * streams_bytes(config, samples, seq_len)),
    ]


def _present_bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file())


def free_bytes(work: Path) -> int:
    """Free space of the file system on which `work` lies or would be made."""
    existing = next(path for path in (work.absolute(), *work.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_space(parts: Sequence[Part], work: Path) -> None:
    """Raises UserError, with how much is missing, when what `parts` still lack does not fit where `work` lies."""
    needed, free = sum(part.missing_bytes for part in parts), free_bytes(work)
    if needed > free:
        raise UserError(
            f"{work} has {free / 1e9:,.1f} GB free, the run writes {needed / 1e9:,.1f} GB:"
            f" {(needed - free) / 1e9:,.1f} GB are missing",
            "free that much there, or pass --work on a larger disk",
        )


def gpu_bytes(config: Config, samples: int, seq_len: int) -> int:
    """Memory of a GPU that has `samples` samples, when the routed experts' outputs are there. tokens = samples *
    seq_len; in bytes:

    carried streams  tokens * hc_mult * hidden * 2
    x and shared     2 * tokens * hidden * 2
    routed outputs   tokens * top_k * hidden * 2
    working set      26 * 2^30
    """
    one = samples * seq_len * config.hidden_size * BF16_BYTES
    return streams_bytes(config, samples, seq_len) + (2 + config.num_experts_per_tok) * one + WORKING_SET_BYTES


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

    @property
    def total_s(self) -> float:
        """Of all layers; fetch, postprocess and verify are not in it."""
        return self.layers * self.layer_s


def layer_time(
    config: Config, sizes: Sizes, samples: int, seq_len: int, read_gbps: float, write_gbps: float, compute_s: float
) -> LayerTime:
    """The time of a layer that takes `compute_s` on the GPUs, with a disk of these speeds, in 10^9 bytes a second."""
    layers = config.num_hidden_layers
    read = layer_bytes(sizes.upstream) // layers
    written = layer_bytes(sizes.artifact) // layers + streams_bytes(config, samples, seq_len) // KEEP_EVERY
    return LayerTime(layers, read, written, read / read_gbps / 1e9, written / write_gbps / 1e9, compute_s)
