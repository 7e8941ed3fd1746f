"""DeepSeek-V4's classes of vLLM's CPU build: the target model with the artifact's names, and the MTP block it lacks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mhc import HCHeadOp
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.deepseek_mtp import SharedHead
from vllm.model_executor.models.utils import maybe_prefix
from vllm.models.deepseek_v4.cpu import model as theirs

Weights = Iterable[tuple[str, Tensor]]


class DeepseekV4ForCausalLM(theirs.DeepseekV4ForCausalLM):
    """The target model. Its names of scales are those of compressed-tensors, not those of upstream's FP8."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if vllm_config.model_config.quantization == "compressed-tensors":
            # The mapping for experts that are not FP4 leaves `.weight_scale` as it is.
            self.hf_to_vllm_mapper = theirs._make_deepseek_v4_weights_mapper("int4")


class MTPLayer(nn.Module):
    """One MTP block: a decoder layer over the projected embedding and hidden state, with a head of its own."""

    def __init__(self, vllm_config: Any, topk_indices_buffer: Tensor, prefix: str) -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        quant_config = vllm_config.quant_config
        size, eps, self.hc_mult = config.hidden_size, config.rms_norm_eps, config.hc_mult
        self.hidden_size, self.rms_norm_eps, self.hc_eps = size, eps, config.hc_eps
        self.enorm, self.hnorm = RMSNorm(size, eps=eps), RMSNorm(size, eps=eps)
        for name in ("e_proj", "h_proj"):
            projection = ReplicatedLinear(
                size, size, bias=False, return_bias=False, quant_config=quant_config, prefix=f"{prefix}.{name}"
            )
            setattr(self, name, projection)
        shapes = {"hc_head_fn": (self.hc_mult, self.hc_mult * size), "hc_head_base": (self.hc_mult,)}
        for name, shape in {**shapes, "hc_head_scale": (1,)}.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False))
        self.hc_head_op = HCHeadOp()
        self.shared_head = SharedHead(config=config, prefix=prefix, quant_config=quant_config)
        self.mtp_block = theirs.DeepseekV4DecoderLayer(vllm_config, prefix, topk_indices_buffer=topk_indices_buffer)
        if self.mtp_block.use_fused_mhc:
            raise NotImplementedError("a fused hyper-connection, which no CPU has")

    def forward(self, input_ids: Tensor, positions: Tensor, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """The streams [tokens, hc_mult * hidden] after the block, from those before the target model's head."""
        embeddings = embeddings.masked_fill((positions == 0).unsqueeze(-1), 0)
        hidden = self.hnorm(hidden.reshape(-1, self.hidden_size)).view(-1, self.hc_mult, self.hidden_size)
        streams = self.h_proj(hidden) + self.e_proj(self.enorm(embeddings)).unsqueeze(-2)
        return self.mtp_block(streams, positions, input_ids)[0].flatten(1)

    def last_hidden(self, streams: Tensor) -> Tensor:
        """[tokens, hidden] that the head takes, of `streams` [tokens, hc_mult * hidden]."""
        streams = streams.view(-1, self.hc_mult, self.hidden_size)
        hidden = self.hc_head_op(
            streams, self.hc_head_fn, self.hc_head_scale, self.hc_head_base, self.rms_norm_eps, self.hc_eps
        )
        return self.shared_head.norm(hidden)


class MTPModel(nn.Module):
    """All MTP blocks, numbered after the layers of the target model, as vLLM numbers their caches."""

    def __init__(self, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.first, self.count = config.num_hidden_layers, config.num_nextn_predict_layers
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        buffer = torch.empty(tokens, config.index_topk, dtype=torch.int32)
        self.layers = nn.ModuleDict(
            {
                str(number): MTPLayer(vllm_config, buffer, f"{prefix}.layers.{number}")
                for number in range(self.first, self.first + self.count)
            }
        )
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def layer(self, step: int) -> MTPLayer:
        return self.layers[str(self.first + step % self.count)]


class DeepSeekV4MTP(nn.Module):
    """The draft model, with the interface of vLLM's class of this name for GPUs."""

    is_fused_shared_expert_enabled = False
    get_expert_mapping = theirs.DeepseekV4Model.get_expert_mapping

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = MTPModel(vllm_config, maybe_prefix(prefix, "model"))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        embeddings = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model.layer(spec_step_idx)(input_ids, positions, hidden_states, embeddings)

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        layer = self.model.layer(spec_step_idx)
        return self.model.logits_processor(layer.shared_head.head, layer.last_hidden(hidden_states))

    def load_weights(self, weights: Weights) -> set[str]:
        """Loads what is named `mtp.`, by vLLM's loader of the target model's layers; the names it has filled."""
        return theirs.DeepseekV4Model.load_weights(self, self._renamed(weights))

    def _renamed(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if match := re.fullmatch(r"mtp\.(\d+)\.(.+)", name):
                yield parameter_name(self.model.first + int(match[1]), match[2]), tensor


# Tensors of an MTP block that are no part of its decoder layer, and what vLLM calls them.
OUTER = {
    **{name: name for name in ("hc_head_fn", "hc_head_base", "hc_head_scale")},
    **{f"{name}.weight": f"{name}.weight" for name in ("enorm", "hnorm", "e_proj", "h_proj")},
    "norm.weight": "shared_head.norm.weight",
    "head.weight": "shared_head.head.weight",
}


def parameter_name(layer: int, name: str) -> str:
    """The parameter of DeepSeekV4MTP for the tensor `mtp.<n>.<name>`, whose block is layer `layer`."""
    if name == "emb.tok_emb.weight":
        return "model.embed_tokens.weight"
    if name in OUTER:
        return f"model.layers.{layer}.{OUTER[name]}"
    name = name.replace("ffn.gate.bias", "ffn.gate.e_score_correction_bias")
    return f"model.layers.{layer}.mtp_block.{name.replace('shared_experts.w2', 'shared_experts.down_proj')}"
