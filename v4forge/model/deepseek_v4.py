"""DeepSeek-V4 one block at a time: a decoder layer and the head, filled from a Checkpoint.

The layers are transformers' own classes. A decoder layer runs in two halves, because calibration needs what lies
between them and can reuse the first half after only the experts have changed: `attend` ends with the routed experts'
input and routing, `combine` adds the routed experts' output.

Weights and activations are in one compute dtype (BF16 unless asked otherwise), while the parameters that a checkpoint
keeps in F32 stay F32, and so does everything computed from them in the layer classes. As in upstream's
inference/model.py, F32 are also the router, attention's logits and those of the head, from inputs in the compute dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v4forge.checkpoint.formats import Shape
from v4forge.checkpoint.layout import Config, layer_parameters, root_parameters
from v4forge.checkpoint.reader import Checkpoint
from v4forge.checkpoint.recipe import rule_for
from v4forge.model.indexer import use_own_indexer
from v4forge.model.layer_classes import ATTENTION, DeepseekV4Config, hf, unfilled
from v4forge.model.names import renamed

EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])\.weight$")
Parameters = Iterator[tuple[str, Shape]]


def hf_config(config: Config) -> DeepseekV4Config:
    """transformers' config with one more layer than the model: index `num_hidden_layers` is the MTP block's."""
    made = DeepseekV4Config(**config.forward | {"num_hidden_layers": config.num_hidden_layers + 1})
    made._attn_implementation = ATTENTION
    return made


@dataclass
class Context:
    """What every layer needs for a batch of sequences of one length: rope tables, mask, token ids."""

    input_ids: Tensor  # [batch, seq]
    position_ids: Tensor  # [1, seq]
    position_embeddings: dict[str, tuple[Tensor, Tensor]]
    attention_mask: Tensor  # [batch, 1, seq, 0]: of windows; or [1, 1, seq, keys] beside `keys`
    keys: Any = None  # where attention adds its keys to those of passes before and reads them all, if it does


class Rotary:
    """Rope tables; one for the whole model."""

    def __init__(self, config: DeepseekV4Config, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.tables = hf.DeepseekV4RotaryEmbedding(config).to(device)

    def context(self, input_ids: Tensor) -> Context:
        """input_ids: [batch, seq] -> its Context."""
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        batch, seq = input_ids.shape  # attention knows the windows; a layer adds the columns of its compressed keys
        mask = torch.empty(batch, 1, seq, 0, dtype=self.dtype, device=input_ids.device)
        return Context(input_ids, position_ids, self.embeddings(position_ids), mask)

    def embeddings(self, position_ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """position_ids: [1, seq] -> cosines and sines, [1, seq, rope_dim / 2] each, by kind of table."""
        like = torch.empty(0, dtype=self.dtype, device=position_ids.device)
        return {kind: self.tables(like, position_ids=position_ids, layer_type=kind) for kind in ("main", "compress")}


def materialize(module: nn.Module, state: dict[str, Tensor], config: DeepseekV4Config, device: torch.device) -> None:
    """Fills a module made on the meta device: `state` for its parameters and buffers, rope tables made anew."""
    module.load_state_dict(state, strict=True, assign=True)
    for name, child in list(module.named_modules()):
        if isinstance(child, hf.DeepseekV4RotaryEmbedding):
            parent = module.get_submodule(name.rpartition(".")[0])
            parent.rotary_emb = hf.DeepseekV4RotaryEmbedding(config).to(device)
        for key, buffer in list(child.named_buffers(recurse=False)):
            if not buffer.is_meta and buffer.device != device:
                child._buffers[key] = buffer.to(device)
    module.eval().requires_grad_(False)


class Weights:
    """Reads logical tensors of a checkpoint onto a device in the compute dtype, F32 and integer tensors as they are."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype

    def __call__(self, name: str, shape: Shape) -> Tensor:
        tensor = self.checkpoint.load(name, shape, self.device)
        # by what upstream keeps in F32, so that source and artifact run in the same arithmetic
        return tensor if rule_for(name).source in ("f32", "int") else tensor.to(self.dtype)

    def block(self, prefix: str, parameters: Parameters, experts: bool = True) -> dict[str, Tensor]:
        """The state dict of a DeepseekV4DecoderLayer from the tensors under `prefix`; experts stacked [E, out, in]."""
        c = self.checkpoint.config
        inner, hidden = c.moe_intermediate_size, c.hidden_size
        new: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        state: dict[str, Tensor] = {}
        slots: dict[str, Tensor] = {}
        if experts:
            gate_up = torch.empty(c.n_routed_experts, 2 * inner, hidden, **new)
            down = torch.empty(c.n_routed_experts, hidden, inner, **new)
            slots = {"w1": gate_up[:, :inner], "w3": gate_up[:, inner:], "w2": down}
            state = {"mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}
        for name, shape in parameters:
            local = name.removeprefix(prefix)
            expert = EXPERT.match(local)
            if expert is None:
                state[renamed(local)] = self(name, shape)
            elif experts:
                slots[expert[2]][int(expert[1])] = self(name, shape)
        if "mlp.gate.tid2eid" in state:
            state["mlp.gate.tid2eid"] = state["mlp.gate.tid2eid"].long()
        return state


def load_layer(
    weights: Weights, config: DeepseekV4Config, layer: int, experts: bool = True
) -> hf.DeepseekV4DecoderLayer:
    """Decoder layer `layer`, on weights.device; without its routed experts it can only `attend`."""
    with unfilled():
        module = hf.DeepseekV4DecoderLayer(config, layer)
        use_own_indexer(module.self_attn, config)
    if not experts:
        module.mlp.experts = nn.Module()
    state = weights.block(f"layers.{layer}.", layer_parameters(weights.checkpoint.config, layer), experts)
    materialize(module, state, config, weights.device)
    return module


class Head(nn.Module):
    """Collapses the residual streams, normalizes, and projects to the vocabulary."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        self.hc_head = hf.DeepseekV4HyperHead(config)
        self.norm = hf.DeepseekV4RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, streams: Tensor, head: Tensor) -> Tensor:
        """streams: [batch, seq, hc_mult, hidden], head: [vocab, hidden] -> logits [batch, seq, vocab] f32."""
        return F.linear(self.norm(self.hc_head(streams)).float(), head.float())


@dataclass
class Root:
    """What lies outside the layers: embedding and output head in the compute dtype, and the final Head."""

    embed: Tensor  # [vocab, hidden]
    head: Tensor  # [vocab, hidden]
    final: Head


def load_root(weights: Weights, config: DeepseekV4Config) -> Root:
    """Embedding, output head, final norm and stream collapse."""
    with unfilled():
        final = Head(config)
    tensors = {n: weights(n, s) for n, s in root_parameters(weights.checkpoint.config)}
    state = {
        "norm.weight": tensors["norm.weight"],
        **{f"hc_head.hc_{k}": tensors[f"hc_head_{k}"] for k in ("fn", "base", "scale")},
    }
    materialize(final, state, config, weights.device)
    return Root(tensors["embed.weight"], tensors["head.weight"].to(weights.dtype), final)


def embed(root: Root, config: DeepseekV4Config, input_ids: Tensor) -> Tensor:
    """input_ids: [batch, seq] -> hc_mult equal residual streams [batch, seq, hc_mult, hidden]."""
    return F.embedding(input_ids, root.embed).unsqueeze(2).expand(-1, -1, config.hc_mult, -1).contiguous()


@dataclass
class Attended:
    """A decoder layer's state just before its routed experts."""

    x: Tensor  # [tokens, hidden], the experts' input
    indices: Tensor  # [tokens, top_k], the experts chosen
    weights: Tensor  # [tokens, top_k] f32, their weights, routed scaling included
    shared: Tensor  # [batch, seq, hidden], the shared expert's output
    post: Tensor  # [batch, seq, hc_mult], how much of the output each stream takes
    carried: Tensor  # [batch, seq, hc_mult, hidden], the mixed streams that the output is added to


def attend(layer: hf.DeepseekV4DecoderLayer, streams: Tensor, context: Context) -> Attended:
    """The first half of a decoder layer: attention, router, shared expert. streams: [batch, seq, hc_mult, hidden]."""
    dtype = streams.dtype
    post, comb, collapsed = layer.attn_hc(streams)
    windows = context.keys is None and layer.self_attn.compressor is None  # whose mask would be filled up with zeros
    attention, _ = layer.self_attn(
        layer.input_layernorm(collapsed),
        position_embeddings=context.position_embeddings,
        position_ids=context.position_ids,
        attention_mask=None if windows else context.attention_mask,
        past_key_values=context.keys,
    )
    streams = mixed(streams, comb.to(dtype), post.to(dtype), attention)
    post, comb, collapsed = layer.ffn_hc(streams)
    x = layer.post_attention_layernorm(collapsed)
    weights, indices = route(layer.mlp, x, context.input_ids)
    return Attended(
        x=x.flatten(0, 1),
        indices=indices,
        weights=weights,
        shared=layer.mlp.shared_experts(x),
        post=post.to(dtype),
        carried=mixed(streams, comb.to(dtype), post.to(dtype)),
    )


def route(mlp: hf.DeepseekV4SparseMoeBlock, x: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The router in F32, of its weight as stored. x: [batch, seq, hidden]; input_ids: [batch, seq] -> the weights and
    the numbers of each token's experts, [tokens, top_k] f32 and int64.

    Rounded to BF16, scores of 256 experts lie so close that 5 to 10 % of the tokens of a layer would get others.
    """
    given = (x.float(), input_ids) if mlp.is_hash else (x.float(),)
    _, weights, indices = torch.func.functional_call(mlp.gate, {"weight": mlp.gate.weight.float()}, given)
    return weights, indices


def mixed(streams: Tensor, comb: Tensor, post: Tensor, output: Tensor | None = None) -> Tensor:
    """Each stream as comb's mixture of all, plus post's share of a sublayer's output.

    streams: [..., hc_mult, hidden]; comb: [..., hc_mult, hc_mult], from row to column; post: [..., hc_mult]; output:
    [..., hidden] -> like streams.
    """
    if streams.is_cuda and not (streams.requires_grad or comb.requires_grad):  # the kernel has no gradient
        from v4forge.model import kernels

        return kernels.mixed(streams, comb, post, output)
    carried = torch.matmul(comb.mT, streams)
    return carried if output is None else post.unsqueeze(-1) * output.unsqueeze(-2) + carried


def combine(attended: Attended, routed: Tensor) -> Tensor:
    """The second half: routed experts' output [tokens, hidden] -> streams [batch, seq, hc_mult, hidden]."""
    output = routed.view_as(attended.shared) + attended.shared
    return attended.post.unsqueeze(-1) * output.unsqueeze(-2) + attended.carried


@dataclass
class Routing:
    """Tokens sorted by expert: row r of a sorted tensor is token `token[r]`; expert e has bounds[e]:bounds[e+1]."""

    token: Tensor  # [tokens * top_k]
    inverse: Tensor  # [tokens * top_k], position of (token, choice) in the sorted order
    bounds: list[int]  # [experts + 1]


def sort_by_expert(indices: Tensor, experts: int) -> Routing:
    """indices: [tokens, top_k] -> Routing; tokens of one expert keep their order."""
    flat = indices.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts)
    bounds = [0, *torch.cumsum(counts, 0).tolist()]
    return Routing(order // indices.shape[1], torch.argsort(order), bounds)


def activation(gate_up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU, the input of w2. gate_up: [tokens, 2 * inner] -> [tokens, inner]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def expert(x: Tensor, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """One routed expert. x: [tokens, hidden]; gate_up: [2 * inner, hidden]; down: [hidden, inner] -> like x."""
    return F.linear(activation(F.linear(x, gate_up), limit), down)


def weighted_sum(by_choice: Tensor, weights: Tensor) -> Tensor:
    """by_choice: [tokens * top_k, hidden]; weights: [tokens, top_k] -> [tokens, hidden].

    Each token's outputs are added in the order of its choices, in F32, however tokens are batched.
    """
    outputs = by_choice.view(*weights.shape, -1).float()
    return (outputs * weights.float().unsqueeze(-1)).sum(1).to(by_choice.dtype)


def routed_experts(attended: Attended, gate_up: Tensor, down: Tensor, limit: float) -> Tensor:
    """The routed experts' weighted sum, [tokens, hidden]; gate_up: [E, 2 * inner, hidden], down: [E, hidden, inner].

    The GEMMs may round otherwise for another number of rows: seen on the CPU in F32 below 256 tokens, not in BF16.
    """
    routing = sort_by_expert(attended.indices, gate_up.shape[0])
    x = attended.x[routing.token]
    out = torch.empty_like(x)
    for e, (start, end) in enumerate(zip(routing.bounds, routing.bounds[1:], strict=False)):
        if end > start:
            out[start:end] = expert(x[start:end], gate_up[e], down[e], limit)
    return weighted_sum(out[routing.inverse], attended.weights)


def run_layer(layer: hf.DeepseekV4DecoderLayer, streams: Tensor, context: Context) -> Tensor:
    """A whole decoder layer: streams -> streams."""
    attended = attend(layer, streams, context)
    experts = layer.mlp.experts
    return combine(attended, routed_experts(attended, experts.gate_up_proj, experts.down_proj, experts.limit))
