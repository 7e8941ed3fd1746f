"""The indexer of compressed sparse attention, without scores of all its heads, queries and keys at a time.

It picks `index_topk` compressed keys for a query. Where there are no more than that, it picks all that lie behind the
query, whatever it thinks of them: so up to 2,048 tokens of DeepSeek-V4-Flash, and then it does not think at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from v4forge.model.layer_classes import DeepseekV4Config, hf

SCORES = 1 << 26  # at a time: 256 MiB in f32; 512 queries of DeepSeek-V4-Flash in 8,192 tokens


class Scorer(hf.DeepseekV4IndexerScorer):
    """transformers' own holds every score, and a copy of the keys for every query."""

    def forward(self, q: Tensor, compressed_kv: Tensor, hidden_states: Tensor) -> Tensor:
        """q: [batch, seq, heads, dim]; compressed_kv: [batch, keys, dim]; hidden_states: [batch, seq, hidden] ->
        [batch, seq, keys] f32."""
        batch, _, heads, _ = q.shape
        keys = compressed_kv.float().mT
        weights = self.weights_proj(hidden_states).float() * (self.weights_scaling * self.softmax_scale)
        rows = max(1, SCORES // (batch * heads * max(1, keys.shape[2])))
        parts = []
        for some, weight in zip(q.split(rows, 1), weights.split(rows, 1), strict=True):
            scores = torch.bmm(some.float().flatten(1, 2), keys).relu_().view(batch, -1, heads, keys.shape[2])
            parts.append((weight.unsqueeze(2) @ scores).squeeze(2))
        return torch.cat(parts, 1)


class Indexer(hf.DeepseekV4Indexer):
    """transformers' own, with our Scorer, and idle where there is nothing to choose."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__(config)
        self.scorer = Scorer(config)

    def forward(
        self, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, past_key_values: Any, layer_idx: int
    ) -> Tensor:
        """The compressed keys that each query sees, [batch, seq, picked] int64; -1 where there are fewer."""
        batch, seq, _ = hidden_states.shape
        count = seq // self.compress_rate
        if past_key_values is not None or count > self.index_topk:
            found: Tensor = super().forward(hidden_states, q_residual, position_ids, past_key_values, layer_idx)
            return found
        number = torch.arange(count, device=hidden_states.device)
        ready = (position_ids + 1) // self.compress_rate  # [1, seq]
        return torch.where(number < ready.unsqueeze(-1), number, -1).expand(batch, -1, -1)


def use_own_indexer(attention: hf.DeepseekV4Attention, config: DeepseekV4Config) -> None:
    """Puts our Indexer, its parameters not filled yet, in the place of transformers' where there is one."""
    if hasattr(attention.compressor, "indexer"):
        attention.compressor.indexer = Indexer(config)
