"""The Multi-Token Prediction block, which transformers has no module for: ours, out of its layer classes."""

from __future__ import annotations

import re

from torch import Tensor, nn

from v4forge.checkpoint.layout import mtp_parameters
from v4forge.model.deepseek_v4 import Context, Head, Weights, materialize, run_layer
from v4forge.model.layer_classes import DeepseekV4Config, hf, unfilled


class MTPBlock(nn.Module):
    """The Multi-Token Prediction block: from the streams at t and the token t+1 to a prediction of token t+2.

    DeepSeek-V3 report (arXiv 2412.19437) section 2.2, with V4's two separate projections and its own stream collapse
    and norm; embedding and output head are the main model's. Like vLLM it reads no embedding at position 0.
    """

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = hf.DeepseekV4RMSNorm(hidden, eps=eps)
        self.hnorm = hf.DeepseekV4RMSNorm(hidden, eps=eps)
        self.e_proj = nn.Linear(hidden, hidden, bias=False)
        self.h_proj = nn.Linear(hidden, hidden, bias=False)
        self.block = hf.DeepseekV4DecoderLayer(config, config.num_hidden_layers - 1)
        self.head = Head(config)

    def forward(self, streams: Tensor, embeds: Tensor, context: Context) -> Tensor:
        """streams: [batch, seq, hc_mult, hidden] of the main model; embeds: [batch, seq, hidden] of the next tokens,
        whose ids context.input_ids holds -> streams of the same shape, for `head` and for the next draft."""
        embeds = embeds.masked_fill((context.position_ids == 0).unsqueeze(-1), 0.0)
        mixed = self.h_proj(self.hnorm(streams)) + self.e_proj(self.enorm(embeds)).unsqueeze(2)
        return run_layer(self.block, mixed, context)


def load_mtp(weights: Weights, config: DeepseekV4Config, experts: tuple[Tensor, Tensor] | None = None) -> MTPBlock:
    """The MTP block, on weights.device; its routed experts' gate_up and down are read where they are not given."""
    with unfilled():
        module = MTPBlock(config)
    own = re.compile(r"mtp\.0\.(enorm|hnorm|e_proj|h_proj|norm|hc_head_(fn|base|scale))(\.weight)?$")
    everything = list(mtp_parameters(weights.checkpoint.config))
    block = weights.block("mtp.0.", ((n, s) for n, s in everything if not own.match(n)), experts is None)
    if experts is not None:
        block |= dict(zip(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), experts, strict=True))
    state = {f"block.{name}": tensor for name, tensor in block.items()}
    for name, shape in everything:
        if own.match(name):
            local = name.removeprefix("mtp.0.")
            if local == "norm.weight":
                local = "head.norm.weight"
            state[local.replace("hc_head_", "head.hc_head.hc_")] = weights(name, shape)
    materialize(module, state, config, weights.device)
    return module
