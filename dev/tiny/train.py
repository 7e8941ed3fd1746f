"""Trains the embedded model: a DeepSeek-V4 of 18 MB, in the exact upstream FP4/FP8 form.

The modules are those that every other stage runs, in the same arithmetic: BF16 weights, F32 parameters. Master weights
are F32; each step writes them, rounded, into the modules (straight-through estimator, Bengio et al. 2013). In the last
part of the training "rounded" means to FP4 and FP8 and back, so that what is exported is what was trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dev.tiny.settings import Settings
from v4forge.checkpoint import codec, layout
from v4forge.checkpoint.formats import FP4_GROUP, FP8_BLOCK
from v4forge.checkpoint.recipe import rule_for
from v4forge.checkpoint.writer import write_index, write_shard
from v4forge.files import write_json
from v4forge.model import deepseek_v4
from v4forge.model.layer_classes import hf
from v4forge.model.mtp import MTPBlock

# Every field of the upstream config.json, at sizes inside vLLM's kernel limits.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 4, 128, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 2,
    "o_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 1024,
}

SHARD_BYTES = 11 << 20  # two shards, each well under 16 MiB


class TinyModel(nn.Module):
    """All blocks at once, with transformers' decoder layers and the MTP block of v4forge.model.deepseek_v4."""

    def __init__(self, config: layout.Config, device: torch.device) -> None:
        super().__init__()
        self.hf_config = deepseek_v4.hf_config(config)
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, device=device))
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, device=device))
        with device:
            self.layers = nn.ModuleList(hf.DeepseekV4DecoderLayer(self.hf_config, i) for i in config.layers)
            self.final = deepseek_v4.Head(self.hf_config)
            self.mtp = MTPBlock(self.hf_config)
        self.rotary = deepseek_v4.Rotary(self.hf_config, device, torch.bfloat16)
        self.context: deepseek_v4.Context | None = None

    def blocks(self) -> Iterator[hf.DeepseekV4DecoderLayer]:
        yield from self.layers
        yield self.mtp.block

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """tokens: [batch, seq + 2] -> cross-entropy of the main model and of the MTP block, loads of each router."""
        loads: list[Tensor] = []

        def run(layer: hf.DeepseekV4DecoderLayer, streams: Tensor, context: deepseek_v4.Context) -> Tensor:
            attended = deepseek_v4.attend(layer, streams, context)
            experts = layer.mlp.experts
            dense = torch.zeros(len(attended.x), experts.num_experts, device=tokens.device, dtype=attended.x.dtype)
            dense = dense.scatter(1, attended.indices, attended.weights.to(dense.dtype))
            loads.append((dense.detach() > 0).float().mean(0))
            hidden = deepseek_v4.activation(
                torch.einsum("th,eih->tei", attended.x, experts.gate_up_proj), experts.limit
            )
            return deepseek_v4.combine(
                attended, torch.einsum("tei,ehi->th", hidden * dense.unsqueeze(-1), experts.down_proj)
            )

        inputs, following = tokens[:, :-2], tokens[:, 1:-1]
        streams = F.embedding(inputs, self.embed).unsqueeze(2).expand(-1, -1, self.hf_config.hc_mult, -1)
        if self.context is None:  # the mask and the rope tables do not depend on the tokens
            self.context = self.rotary.context(inputs)
        context = replace(self.context, input_ids=inputs)
        for layer in self.layers:
            streams = run(layer, streams, context)
        main = F.cross_entropy(self.final(streams, self.head).flatten(0, 1), following.flatten())
        context = replace(context, input_ids=following)
        embeds = F.embedding(following, self.embed).masked_fill((context.position_ids == 0).unsqueeze(-1), 0.0)
        mixed = self.mtp.h_proj(self.mtp.hnorm(streams)) + self.mtp.e_proj(self.mtp.enorm(embeds)).unsqueeze(2)
        drafted = run(self.mtp.block, mixed, context)
        draft = F.cross_entropy(self.mtp.head(drafted, self.head).flatten(0, 1), tokens[:, 2:].flatten())
        return main, draft, loads


def logical_tensors(tiny: TinyModel, config: layout.Config) -> Iterator[tuple[str, Tensor]]:
    """(logical upstream name, the tensor of the module that holds it), a view for an expert's matrix."""
    state = dict(tiny.state_dict(keep_vars=True))
    inner = config.moe_intermediate_size
    roots = {"embed.weight": "embed", "head.weight": "head", "norm.weight": "final.norm.weight"}
    for name, _ in layout.parameters(config):
        if name in roots:
            yield name, state[roots[name]]
            continue
        if name.startswith("hc_head_"):
            yield name, state["final.hc_head.hc_" + name.removeprefix("hc_head_")]
            continue
        kind, index, local = name.split(".", 2)
        prefix = f"layers.{index}." if kind == "layers" else "mtp.block."
        if expert := deepseek_v4.EXPERT.match(local):
            e, which = int(expert[1]), expert[2]
            stacked = state[prefix + ("mlp.experts.down_proj" if which == "w2" else "mlp.experts.gate_up_proj")][e]
            yield name, {"w1": stacked[:inner], "w3": stacked[inner:], "w2": stacked}[which]
        elif kind == "mtp" and (own := _own_mtp_name(local)):
            yield name, state[own]
        else:
            yield name, state[prefix + deepseek_v4.renamed(local)]


def _own_mtp_name(local: str) -> str | None:
    if local.startswith("hc_head_"):
        return "mtp.head.hc_head.hc_" + local.removeprefix("hc_head_")
    if local == "norm.weight":
        return "mtp.head.norm.weight"
    return f"mtp.{local}" if local.split(".")[0] in ("enorm", "hnorm", "e_proj", "h_proj") else None


def initialize(tiny: TinyModel, config: layout.Config, seed: int) -> None:
    """Random weights: Linears N(0, 1/in), smaller if they write to streams; norms 1, hyper-connections near even."""
    generator = torch.Generator().manual_seed(seed)
    writers = 1 / math.sqrt(2 * (config.num_hidden_layers + 1))
    with torch.no_grad():
        for name, tensor in logical_tensors(tiny, config):
            shape = tensor.shape
            if name.endswith("tid2eid"):
                rows = [
                    torch.randperm(config.n_routed_experts, generator=generator)[: shape[1]] for _ in range(shape[0])
                ]
                value = torch.stack(rows)
            elif "norm.weight" in name or name.endswith("_scale"):
                value = torch.ones(shape)
            elif name.endswith(("_base", "attn_sink", "ape", "gate.bias")):
                value = torch.zeros(shape)
            else:
                std = 1 / math.sqrt(shape[-1])
                std *= writers if name.endswith(("wo_b.weight", ".w2.weight")) else 1.0
                std *= 0.1 if name.endswith("_fn") else 1.0
                value = torch.randn(shape, generator=generator) * std
            tensor.data.copy_(value)


def rounded(tensor: Tensor, fmt: str) -> Tensor:
    """A weight as it reads back from upstream format `fmt`; the last two dimensions are [out, in]. No host sync."""
    if fmt == "fp4":
        groups = tensor.unflatten(-1, (-1, FP4_GROUP))
        scale = codec.e8m0_to_f32(codec.power_of_two_scale(groups.abs().amax(-1), codec.E2M1_MAX, codec.FP4_SCALES))
        code = codec.round_to_e2m1(groups / scale.unsqueeze(-1))
        return (codec.e2m1_values(tensor.device)[code.int()] * scale.unsqueeze(-1)).flatten(-2)
    if fmt == "fp8":
        stored = codec.encode_fp8(tensor)
        scale = codec.e8m0_to_f32(stored["scale"])
        out, inp = tensor.shape
        full = scale.repeat_interleave(FP8_BLOCK, 0)[:out].repeat_interleave(FP8_BLOCK, 1)[:, :inp]
        return stored["weight"].float() * full
    return tensor


class Trainer:
    """Masters in F32, modules in what they are served in, AdamW over the masters."""

    def __init__(self, config: layout.Config, settings: Settings, device: torch.device) -> None:
        self.config, self.settings, self.device = config, settings, device
        self.tiny = TinyModel(config, device)
        initialize(self.tiny, config, settings.seed)
        # one source format per parameter: an expert stack has that of its matrices
        formats = {}
        for name, tensor in logical_tensors(self.tiny, config):
            owner = tensor._base if tensor._base is not None else tensor
            formats[owner.data_ptr()] = rule_for(name).source
        self.parameters = [p for p in self.tiny.parameters()]
        self.formats = [formats[p.data_ptr()] for p in self.parameters]
        self.masters = [p.detach().clone().float() for p in self.parameters]
        for p, fmt in zip(self.parameters, self.formats, strict=True):
            p.data = p.data.to(torch.float32 if fmt == "f32" else torch.bfloat16)
        decayed = [m.dim() > 1 and f != "f32" for m, f in zip(self.masters, self.formats, strict=True)]
        groups = [
            {
                "params": [m for m, d in zip(self.masters, decayed, strict=True) if d],
                "weight_decay": settings.weight_decay,
            },
            {"params": [m for m, d in zip(self.masters, decayed, strict=True) if not d], "weight_decay": 0.0},
        ]
        self.learning_rate = torch.zeros((), device=device)
        graphed = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.learning_rate if graphed else 1e-3, betas=(0.9, 0.95), capturable=graphed
        )
        self.tokens = torch.zeros(settings.batch, settings.seq_len + 2, dtype=torch.int64, device=device)
        self.losses = torch.zeros(2, device=device)

    @torch.no_grad()
    def publish(self, quantized: bool) -> None:
        """Writes the masters into the modules, rounded."""
        for parameter, master, fmt in zip(self.parameters, self.masters, self.formats, strict=True):
            parameter.copy_(rounded(master, fmt) if quantized else master)

    def step(self, quantized: bool) -> None:
        """One optimizer step on self.tokens; leaves the losses in self.losses."""
        self.publish(quantized)
        main, draft, loads = self.tiny(self.tokens)
        for parameter in self.parameters:
            parameter.grad = None
        (main + self.settings.mtp_weight * draft).backward()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
            torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
            self.optimizer.step()
            for block, load in zip(self.tiny.blocks(), loads, strict=True):
                if not block.mlp.is_hash:
                    block.mlp.gate.e_score_correction_bias += self.settings.bias_step * torch.sign(load.mean() - load)
            self.losses.copy_(torch.stack((main, draft)))

    def schedule(self, step: int) -> float:
        """Linear warm-up, then cosine to 2%."""
        s = self.settings
        if step < s.warmup:
            return s.learning_rate * (step + 1) / s.warmup
        progress = (step - s.warmup) / max(1, s.steps - s.warmup)
        return s.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def batches(text: Tensor, settings: Settings) -> Iterator[Tensor]:
    """text: [tokens] -> [batch, seq_len + 2], random windows from the seed."""
    generator = torch.Generator().manual_seed(settings.seed + 1)
    width = settings.seq_len + 2
    for _ in range(settings.steps):
        starts = torch.randint(len(text) - width, (settings.batch, 1), generator=generator)
        yield text[starts + torch.arange(width)]


def train(
    text: Tensor, settings: Settings, device: torch.device, progress: Callable[[int, float, float], None]
) -> tuple[TinyModel, layout.Config]:
    """text: [tokens] int64 -> the trained model, its weights rounded to what FP4, FP8 and BF16 hold.

    On a GPU the whole step is one CUDA graph: at this size the launches cost more than the arithmetic.
    """
    config = layout.parse_config(CONFIG, "the embedded model's config")
    trainer = Trainer(config, settings, device)
    switch = int(settings.steps * settings.quantized_from)
    replay: dict[bool, Callable[[], None]] = {}
    for number, batch in enumerate(batches(text, settings)):
        trainer.tokens.copy_(batch)
        rate = trainer.schedule(number)
        trainer.learning_rate.fill_(rate)
        quantized = number >= switch
        if device.type == "cuda" and number not in range(3) and number != switch:
            if quantized not in replay:
                replay[quantized] = _capture(trainer, quantized)
            replay[quantized]()
        else:
            if device.type != "cuda":
                for group in trainer.optimizer.param_groups:
                    group["lr"] = rate
            trainer.step(quantized)
        if number % 100 == 0 or number == settings.steps - 1:
            progress(number, *trainer.losses.tolist())
    trainer.publish(quantized=True)
    return trainer.tiny, config


def _capture(trainer: Trainer, quantized: bool) -> Callable[[], None]:
    """Records a training step as a CUDA graph; calling the result replays it on the current trainer.tokens."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trainer.step(quantized)
    return graph.replay


def export(tiny: TinyModel, config: layout.Config, out: Path) -> None:
    """Writes the model in the upstream form: shards, index and config.json.

    The scales of the last layer's attention go to the other shard than their weights, as happens upstream.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in logical_tensors(tiny, config):
        fmt = rule_for(name).source
        value = tensor.detach().cpu()
        if fmt in ("fp4", "fp8"):
            encoded = (codec.encode_fp4 if fmt == "fp4" else codec.encode_fp8)(value.float())
            stored |= {layout.stored_name(name, part): t for part, t in encoded.items()}
        else:
            stored[name] = value.to({"bf16": torch.bfloat16, "f32": torch.float32, "int": torch.int64}[fmt])
    straddling = {
        n for n in stored if n.startswith(f"layers.{config.num_hidden_layers - 1}.attn.") and n.endswith(".scale")
    }
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in stored.items():
        if name not in straddling:
            if filled > SHARD_BYTES:
                shards.append({})
                filled = 0
            shards[-1][name] = tensor
            filled += tensor.numel() * tensor.element_size()
    holder = {name: i for i, shard in enumerate(shards) for name in shard}
    for name in straddling:
        weight = name.removesuffix("scale") + "weight"
        shards[(holder[weight] + 1) % len(shards)][name] = stored[name]
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_shard(out / file, shard)
    total = sum(t.numel() * t.element_size() for t in stored.values())
    write_index(out, {n: file for file, shard in zip(names, shards, strict=True) for n in shard}, total)
    write_json(out / "config.json", CONFIG)
