"""The MTP block in plain torch, as a second implementation, and how far two tensors are apart."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.reader import Checkpoint


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference, relative to b's."""
    return float((a.double() - b.double()).norm() / b.double().norm())


class PlainMTP:
    """The MTP block in float64, from the definition: plain tensors under upstream names.

    DeepSeek-V3 report (arXiv 2412.19437) section 2.2 for the block; for the layer the DeepSeek-V4 report's sections on
    manifold-constrained hyper-connections, shared-KV sliding attention with sinks, and the sqrt-softplus router.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.c = checkpoint.config.raw
        shapes = layout.mtp_parameters(checkpoint.config)
        self.w = {n.removeprefix("mtp.0."): checkpoint.load(n, s).double() for n, s in shapes}
        self.head = checkpoint.raw("head.weight").double()

    def rms(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.c["rms_norm_eps"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.rms(x) * self.w[f"{name}.weight"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T

    def rotate(self, x: Tensor, sign: int) -> Tensor:
        """The last qk_rope_head_dim channels of x: [seq, ..., head_dim], neighbours as complex numbers, turned by
        sign * position * theta^(-2i/dim)."""
        dim = self.c["qk_rope_head_dim"]
        frequency = self.c["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = sign * torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
        angle = angle.view(len(x), *[1] * (x.dim() - 2), dim // 2)
        even, odd = x[..., -dim::2], x[..., 1 - dim :: 2]
        turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
        return torch.cat((x[..., :-dim], torch.stack(turned, -1).flatten(-2)), -1)

    def attention(self, x: Tensor) -> Tensor:
        """x: [seq, hidden]; one KV head, whose keys are its values."""
        seq, heads, dim = len(x), self.c["num_attention_heads"], self.c["head_dim"]
        q = self.linear(self.norm(self.linear(x, "attn.wq_a"), "attn.q_norm"), "attn.wq_b").view(seq, heads, dim)
        q = self.rotate(self.rms(q), +1)
        kv = self.rotate(self.norm(self.linear(x, "attn.wkv"), "attn.kv_norm"), +1)
        age = torch.arange(seq)[:, None] - torch.arange(seq)
        seen = (age >= 0) & (age < self.c["sliding_window"])
        score = torch.exp(torch.einsum("qhd,kd->hqk", q, kv) / math.sqrt(dim)) * seen
        total = score.sum(-1) + torch.exp(self.w["attn.attn_sink"])[:, None]  # the sink takes a share, gives nothing
        out = torch.einsum("hqk,kd->qhd", score / total[..., None], kv)
        out = self.rotate(out, -1)  # values carried their rotation along: back to relative positions
        groups = out.reshape(seq, self.c["o_groups"], -1)
        wo_a = self.w["attn.wo_a.weight"].view(self.c["o_groups"], self.c["o_lora_rank"], -1)
        return self.linear(torch.einsum("sgi,goi->sgo", groups, wo_a).flatten(1), "attn.wo_b")

    def expert(self, x: Tensor, name: str) -> Tensor:
        gated = swiglu(self.linear(x, f"{name}.w1"), self.linear(x, f"{name}.w3"), self.c["swiglu_limit"])
        return self.linear(gated, f"{name}.w2")

    def experts(self, x: Tensor) -> Tensor:
        """x: [seq, hidden]; top-k by score plus bias, weighted by scores without it."""
        score = torch.sqrt(torch.log1p(torch.exp(self.linear(x, "ffn.gate"))))
        order = (score + self.w["ffn.gate.bias"]).argsort(dim=1, descending=True)
        chosen = torch.zeros_like(score)
        for rank in range(self.c["num_experts_per_tok"]):
            chosen[torch.arange(len(x)), order[:, rank]] = 1
        share = chosen * score / (chosen * score).sum(1, keepdim=True) * self.c["routed_scaling_factor"]
        every = [share[:, e, None] * self.expert(x, f"ffn.experts.{e}") for e in range(self.c["n_routed_experts"])]
        return sum(every) + self.expert(x, "ffn.shared_experts")

    def hyper_connected(self, streams: Tensor, site: str, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """streams: [seq, n, hidden] -> the same; pre collapses them, post spreads the output, comb mixes them."""
        n, eps = self.c["hc_mult"], self.c["hc_eps"]
        mix = self.rms(streams.flatten(1)) @ self.w[f"hc_{site}_fn"].T
        scale, base = self.w[f"hc_{site}_scale"], self.w[f"hc_{site}_base"]
        pre = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + eps
        post = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = torch.softmax((mix[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n), -1) + eps
        for iteration in range(self.c["hc_sinkhorn_iters"]):  # rows first, which the softmax has just done
            if iteration:
                comb = comb / (comb.sum(2, keepdim=True) + eps)
            comb = comb / (comb.sum(1, keepdim=True) + eps)
        assert (comb.sum(1) - 1).abs().max() < 1e-4 and (comb.sum(2) - 1).abs().max() < 1e-2
        output = sublayer(self.norm(torch.einsum("sn,snd->sd", pre, streams), f"{site}_norm"))
        return post[:, :, None] * output[:, None] + torch.einsum("sjk,sjd->skd", comb, streams)

    def __call__(self, streams: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """streams: [seq, n, hidden], embeds: [seq, hidden] -> streams and logits [seq, vocab]."""
        embeds = embeds.clone()
        embeds[0] = 0  # position 0 has no embedding, as in vLLM
        mixed = self.linear(self.norm(streams, "hnorm"), "h_proj")
        mixed = mixed + self.linear(self.norm(embeds, "enorm"), "e_proj")[:, None]
        mixed = self.hyper_connected(mixed, "attn", self.attention)
        mixed = self.hyper_connected(mixed, "ffn", self.experts)
        share = self.rms(mixed.flatten(1)) @ self.w["hc_head_fn"].T * self.w["hc_head_scale"] + self.w["hc_head_base"]
        collapsed = torch.einsum("sn,snd->sd", torch.sigmoid(share) + self.c["hc_eps"], mixed)
        return mixed, self.norm(collapsed, "norm") @ self.head.T


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    gate = gate.clamp(max=limit)
    return gate / (1 + torch.exp(-gate)) * up.clamp(-limit, limit)
