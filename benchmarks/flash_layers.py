"""Writes a random checkpoint in the upstream form: DeepSeek-V4-Flash's dimensions, a few decoder layers deep.

    python -m benchmarks.flash_layers --out /scratch/flash-3 --layers 3

Layer 0 has sliding attention and hash routing, then ratios 4 and 128 alternate; the MTP block comes last, as always.
Weights are Gaussian, so that experts and their Hessians cost what the real ones cost; they predict nothing. With
--predictable they do: behind a token comes `follower` of it, most likely, for the model and for its MTP block, while
every layer adds its part to the logits. The same seed gives the same bytes on the same kind of device.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4forge.checkpoint import codec, layout
from v4forge.checkpoint.formats import Shape
from v4forge.checkpoint.layout import Config, stored_name
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import rule_for
from v4forge.checkpoint.writer import write_index, write_shard
from v4forge.errors import UserError, run_main
from v4forge.files import make_folder, write_json
from v4forge.pipeline import requirements
from v4forge.units import GB

FP4_BATCH = 16  # matrices encoded at a time: 7 GB of temporaries on the device at full size
# Of a predictable model: what a layer adds to the streams, beside the embedding, and the logit of the token to come,
# above 129,280 others of deviation 1.3.
SMALL_PART = 1 / 8
CLEAR_LOGIT = 12.0
LOGNORMAL_MEAN = math.exp(0.125)  # of the norms' weights below
OUTWARD = re.compile(r"(attn\.wo_b|ffn\..*w2|h_proj)\.weight$")  # what writes into the streams
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "int": torch.int64}

# What --small divides, for a CPU.
SMALL: dict[str, Any] = {
    "head_dim": 64,
    "hidden_size": 256,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "index_topk": 16,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "o_groups": 2,
    "o_lora_rank": 64,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 16,
    "vocab_size": 1024,
}


def config_dict(layers: int, small: bool = False) -> dict[str, Any]:
    """The content of config.json: Flash's, with `layers` decoder layers, the first of them hash-routed."""
    depth = {
        "compress_ratios": [*[0, *[4, 128] * layers][:layers], 0],
        "num_hash_layers": 1,
        "num_hidden_layers": layers,
    }
    return requirements.flash_config().raw | (SMALL if small else {}) | depth


def random_tensor(name: str, shape: Shape, config: Config, generator: torch.Generator) -> Tensor:
    """A logical tensor, f32 or int64 on the generator's device, under which a forward pass stays of order one.

    Norms of the hidden size are lognormal, so that the inputs of experts have channels of very different sizes.
    """
    device = generator.device
    if name.endswith("tid2eid"):
        scores = torch.rand(shape[0], config.n_routed_experts, generator=generator, device=device)
        return scores.topk(shape[1]).indices
    if name.endswith(("gate.bias", "attn_sink")):
        return torch.zeros(shape, device=device)
    noise = torch.randn(shape, generator=generator, device=device)
    if name.endswith("norm.weight"):
        return torch.exp(0.5 * noise) if shape == (config.hidden_size,) else 1 + 0.1 * noise
    if name.endswith("_scale"):
        return 0.5 + 0.1 * noise
    if name.endswith(("_base", "ape")):
        return 0.1 * noise
    if name == "embed.weight":
        return noise
    return noise / math.sqrt(shape[-1])


def follower(tokens: Tensor, vocab_size: int) -> Tensor:
    """The token behind each one in a predictable model: a permutation of the vocabulary."""
    step = next(factor for factor in (5, 7, 11, 13) if vocab_size % factor)
    return (tokens * step + 3) % vocab_size


def predictable(name: str, value: Tensor, embed: Tensor | None) -> Tensor:
    """A random tensor as a predictable model has it. embed: [vocab, hidden], of the same model, for its head."""
    if name == "head.weight":
        assert embed is not None
        ids = follower(torch.arange(len(embed), device=embed.device), len(embed))
        return value.index_add_(0, ids, embed, alpha=CLEAR_LOGIT / LOGNORMAL_MEAN / embed.shape[1])
    if name.endswith("e_proj.weight"):
        return torch.eye(len(value), device=value.device)
    return value * SMALL_PART if OUTWARD.search(name) else value


def random_fp4(names: list[str], shape: Shape, generator: torch.Generator, part: float = 1.0) -> dict[str, Tensor]:
    """The stored tensors of Gaussian FP4 matrices [out, in] of one shape, on the CPU, encoded on the device.

    Groups run along the inputs, so the rows of several matrices are encoded as one tall matrix.
    """
    rows, columns = shape
    stored: dict[str, Tensor] = {}
    for start in range(0, len(names), FP4_BATCH):
        some = names[start : start + FP4_BATCH]
        tall = torch.randn(len(some) * rows, columns, generator=generator, device=generator.device)
        for kind, tensor in codec.encode_fp4(tall.mul_(part / math.sqrt(columns)).bfloat16()).items():
            stored |= {stored_name(n, kind): t for n, t in zip(some, tensor.cpu().split(rows), strict=True)}
    return stored


def random_tensors(
    parameters: Iterable[tuple[str, Shape]], config: Config, generator: torch.Generator, predicts: bool = False
) -> dict[str, Tensor]:
    """The stored tensors of logical ones in their upstream formats, on the CPU; of a predictable model, or not."""
    stored: dict[str, Tensor] = {}
    fp4: dict[tuple[Shape, float], list[str]] = {}
    embed = None
    for name, shape in parameters:
        fmt = rule_for(name).source
        if fmt == "fp4":
            part = SMALL_PART if predicts and OUTWARD.search(name) else 1.0
            fp4.setdefault((shape, part), []).append(name)
            continue
        value = random_tensor(name, shape, config, generator)
        if predicts:
            embed = value if name == "embed.weight" else embed
            value = predictable(name, value, embed)
        parts = codec.encode_fp8(value.bfloat16()) if fmt == "fp8" else {"": value.to(DTYPES[fmt])}
        stored |= {stored_name(name, part): tensor.cpu() for part, tensor in parts.items()}
    for (shape, part), names in fp4.items():
        stored |= random_fp4(names, shape, generator, part)
    return stored


def write_checkpoint(
    out: Path,
    raw: dict[str, Any],
    seed: int,
    device: torch.device,
    say: Callable[[str], None] = lambda _line: None,
    predicts: bool = False,
) -> Config:
    """Writes shards, index and config.json into `out`, one shard in host memory at a time; `raw` is the config.

    Shards are the root, one a layer, and the MTP block. Raises UserError when the result is not what `raw` asks for.
    """
    config = layout.parse_config(raw, "the benchmark's config")
    generator = torch.Generator(device).manual_seed(seed)
    groups = {"root": layout.root_parameters(config)}
    groups |= {f"layer {i}": layout.layer_parameters(config, i) for i in config.layers}
    groups |= {"MTP block": layout.mtp_parameters(config)}
    make_folder(out)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, (what, parameters) in enumerate(groups.items(), start=1):
        started = time.monotonic()
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = random_tensors(parameters, config, generator, predicts)
        made = time.monotonic()
        write_shard(out / shard, tensors)
        written = time.monotonic()
        shard_bytes = sum(t.nbytes for t in tensors.values())
        say(
            f"{shard}  {what:<9}  {shard_bytes / GB:7.3f} GB  made in {made - started:.1f} s,"
            f" written in {written - made:.1f} s"
        )
        weight_map |= dict.fromkeys(tensors, shard)
        total_bytes += shard_bytes
        del tensors
    write_index(out, weight_map, total_bytes)
    write_json(out / "config.json", raw)
    Checkpoint(out).validate(layout.upstream(config))
    return config


def zipf_tokens(samples: int, seq_len: int, vocab_size: int, seed: int) -> Tensor:
    """Token ids whose frequencies fall as 1 / rank, as those of text do, ids shuffled: [samples, seq_len] int64."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    ranks = torch.multinomial(frequencies, samples * seq_len, replacement=True, generator=generator)
    return torch.randperm(vocab_size, generator=generator)[ranks].view(samples, seq_len)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flash_layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Three layers need 17 GB on disk.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the checkpoint")
    parser.add_argument("--layers", type=int, default=3, metavar="N", help="decoder layers (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="small dimensions, in seconds on a CPU")
    parser.add_argument("--predictable", action="store_true", help="a model whose next token can be told")
    args = parser.parse_args()
    if args.layers < 1:
        parser.error("--layers is at least 1")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: torch sees no GPU here", "pass --device cpu, with --small")
    raw = config_dict(args.layers, args.small)
    write_checkpoint(args.out, raw, args.seed, device, lambda s: print(s, flush=True), args.predictable)


if __name__ == "__main__":
    run_main(main)
