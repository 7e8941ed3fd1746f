"""The layer loop: forward, accumulate Hessians, quantize, forward again. One finished layer is one file.

A layer file holds every tensor of its layer in the artifact's form. A run that finds one of its own fingerprint
continues behind it: the forward passes of finished layers are repeated on their quantized experts, which gives the
same streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from v4forge import gptq, layout, model
from v4forge.checkpoint import Checkpoint, write_shard
from v4forge.codec import encode_int4
from v4forge.conversion import converted
from v4forge.corpus import Corpus
from v4forge.errors import UserError
from v4forge.files import write_json
from v4forge.layers import Settings, digest_of, finished, layer_file, layer_report, read_experts

SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "searched": gptq.searched_scales,
    "absmax": lambda weights, _hessians: gptq.absmax_scales(weights),
}
EXPERT_BATCH = 32  # experts quantized at a time
SAMPLE_FACTOR = 4  # tokens sampled for w2's common Hessian, in widths


@dataclass(frozen=True)
class Hessians:
    """Means of x^T x per expert, blended where tokens were too few: w1 and w3 share `hidden`, w2 has `inner`."""

    hidden: Tensor  # [E, hidden, hidden] f32
    inner: Tensor  # [E, inner, inner] f32
    tokens: list[int]  # per expert
    blended: list[dict[str, Any]]


def accumulate(batches: list[model.Attended], gate_up: Tensor, limit: float) -> Hessians:
    """Hessians of the inputs that routing sends to each expert. gate_up: [E, 2 * inner, hidden], unquantized."""
    experts, width, hidden = gate_up.shape
    inner = width // 2
    h_hidden = torch.zeros(experts, hidden, hidden, device=gate_up.device)
    h_inner = torch.zeros(experts, inner, inner, device=gate_up.device)
    counts = [0] * experts
    for batch in batches:
        routing = model.sort_by_expert(batch.indices, experts)
        x = batch.x[routing.token]
        for e, (start, end) in enumerate(zip(routing.bounds, routing.bounds[1:], strict=False)):
            if end > start:
                h_hidden[e] += gptq.gram(x[start:end])
                h_inner[e] += gptq.gram(model.activation(F.linear(x[start:end], gate_up[e]), limit))
                counts[e] += end - start
    scale = torch.tensor(counts, dtype=torch.float32, device=gate_up.device).clamp_min(1).view(-1, 1, 1)
    h_hidden /= scale
    h_inner /= scale
    few = [e for e in range(experts) if counts[e] < max(hidden, inner)]
    notes = []
    if few:
        total = sum(len(batch.x) for batch in batches)
        everything = torch.stack([gptq.gram(batch.x) for batch in batches]).sum(0) / total
        stride = max(1, total // (SAMPLE_FACTOR * inner))
        sample = torch.cat([batch.x for batch in batches])[::stride]
        for e in few:
            inputs = []
            if counts[e] < hidden:
                h_hidden[e] = gptq.blended(h_hidden[e], counts[e], everything)
                inputs.append("w1, w3")
            if counts[e] < inner:
                common = gptq.gram(model.activation(F.linear(sample, gate_up[e]), limit)) / len(sample)
                h_inner[e] = gptq.blended(h_inner[e], counts[e], common)
                inputs.append("w2")
            notes.append({"expert": e, "tokens": counts[e], "inputs": ", ".join(inputs)})
    return Hessians(h_hidden, h_inner, counts, notes)


@dataclass(frozen=True)
class LayerExperts:
    """A layer's quantized routed experts: w1 and w3 stacked as `gate_up`, w2 as `down`, and the layer's report."""

    gate_up: gptq.Quantized
    down: gptq.Quantized
    report: dict[str, Any]

    def tensors(self, layer: int) -> dict[str, Tensor]:
        """Stored tensors under their artifact names, on the CPU."""
        gate_up, gate_up_scale = self.gate_up.codes.cpu(), self.gate_up.scale.cpu()
        down, down_scale = self.down.codes.cpu(), self.down.scale.cpu()
        inner = gate_up.shape[1] // 2
        stored = {}
        for e in range(len(gate_up)):
            matrices = {
                "w1": (gate_up[e, :inner], gate_up_scale[e, :inner]),
                "w2": (down[e], down_scale[e]),
                "w3": (gate_up[e, inner:], gate_up_scale[e, inner:]),
            }
            for which, (codes, scale) in matrices.items():
                for part, tensor in encode_int4(codes, scale).items():
                    stored[f"layers.{layer}.ffn.experts.{e}.{which}.{part}"] = tensor
        return stored


def quantize(gate_up: Tensor, down: Tensor, hessians: Hessians | None, settings: Settings) -> LayerExperts:
    """gate_up: [E, 2 * inner, hidden]; down: [E, hidden, inner] -> INT4; without Hessians round-to-nearest.

    EXPERT_BATCH experts at a time, which bounds the temporary memory.
    """
    weights = list(zip(gate_up.split(EXPERT_BATCH), down.split(EXPERT_BATCH), strict=True))
    nearest = [[gptq.round_to_nearest(w, gptq.absmax_scales(w)) for w in some] for some in weights]
    if hessians is None:
        both = [gptq.concatenated(parts) for parts in zip(*nearest, strict=True)]
        return LayerExperts(both[0], both[1], {"tokens": [], "error": {}, "blended": [], "fallback": []})
    energies = list(zip(hessians.hidden.split(EXPERT_BATCH), hessians.inner.split(EXPERT_BATCH), strict=True))
    scales = SCALES[settings.scales]
    quantized = [
        [gptq.gptq(w, h, scales(w, h), settings.dampening) for w, h in zip(some, energy, strict=True)]
        for some, energy in zip(weights, energies, strict=True)
    ]
    error: dict[str, dict[str, list[float]]] = {which: {"gptq": [], "rtn": []} for which in ("w1", "w2", "w3")}
    for method, results in {"gptq": quantized, "rtn": nearest}.items():
        for some, energy, result in zip(weights, energies, results, strict=True):
            for which, lost in _errors(some, energy, result).items():
                error[which][method] += lost.tolist()
    both = [gptq.concatenated(parts) for parts in zip(*quantized, strict=True)]
    fallback = [f"{kind} of expert {e}" for kind, q in zip(("w1, w3", "w2"), both, strict=True) for e in q.fallback]
    report = {"tokens": hessians.tokens, "error": error, "blended": hessians.blended, "fallback": fallback}
    return LayerExperts(both[0], both[1], report)


def _errors(
    weights: tuple[Tensor, ...], energies: tuple[Tensor, ...], quantized: Sequence[gptq.Quantized]
) -> dict[str, Tensor]:
    """Relative Hessian-weighted error per matrix kind, [experts] f64; the arguments are gate_up's and down's."""
    (gate_up, down), (hidden, inner) = weights, energies
    up_served, down_served = (q.dequantized() for q in quantized)
    half = gate_up.shape[1] // 2
    return {
        "w1": gptq.weighted_error(gate_up[:, :half], up_served[:, :half], hidden),
        "w2": gptq.weighted_error(down, down_served, inner),
        "w3": gptq.weighted_error(gate_up[:, half:], up_served[:, half:], hidden),
    }


@torch.no_grad()
def calibrate(
    source: Checkpoint,
    corpus: Corpus | None,
    work: Path,
    settings: Settings,
    mark: Mapping[str, Any],
    device: torch.device,
    progress: Callable[[int, str], None] = lambda _layer, _what: None,
) -> None:
    """Writes every layer file that `work` lacks. `corpus` may be None for round-to-nearest only.

    Raises UserError when the source is broken or a forward pass leaves the finite numbers.
    """
    config, digest = source.config, digest_of(mark)
    source.validate(layout.upstream(config))
    todo = [i for i in config.layers if not finished(work, i, digest)]
    if not todo:
        return
    weights = model.Weights(source, device)
    hf_config = model.hf_config(config)
    root = model.load_root(weights, hf_config)
    for name, shape in layout.mtp_parameters(config):
        weights(name, shape)  # for its checks: postprocess reads the MTP block, long after
    rotary = model.Rotary(hf_config, device, weights.dtype)
    batches: list[Tensor] = []
    streams: list[Tensor] = []
    if corpus is not None:
        batches = list(corpus.tokens.to(device).split(settings.micro_batch))
        streams = [model.embed(root, hf_config, batch) for batch in batches]
    del root
    for index in config.layers:
        if index > todo[-1] or (corpus is None and index not in todo):
            continue
        progress(index, "reading")
        layer = model.load_layer(weights, hf_config, index)
        limit = layer.mlp.experts.limit
        progress(index, "forward")
        attended = [model.attend(layer, s, rotary.context(batch)) for s, batch in zip(streams, batches, strict=True)]
        streams.clear()
        if index in todo:
            gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            progress(index, "Hessians")
            hessians = accumulate(attended, gate_up, limit) if attended else None
            _refuse_nan(index, hessians)
            progress(index, settings.method)
            experts = quantize(gate_up, down, hessians, settings)
            progress(index, "writing")
            _write_layer(source, work, index, experts, settings, digest)
            served = experts.gate_up.dequantized(), experts.down.dequantized()
        else:
            served = read_experts(work, config, index, device)
        del layer
        if index != todo[-1]:
            streams = [model.combine(a, model.routed_experts(a, *served, limit)) for a in attended]


def _refuse_nan(layer: int, hessians: Hessians | None) -> None:
    if hessians and not all(bool(h.isfinite().all()) for h in (hessians.hidden, hessians.inner)):
        raise UserError(
            f"the inputs of layer {layer}'s experts hold NaN or Inf", "check the source: python -m scripts.fetch --help"
        )


def _write_layer(
    source: Checkpoint, work: Path, layer: int, experts: LayerExperts, settings: Settings, digest: str
) -> None:
    tensors = experts.tensors(layer)
    for name, shape in layout.layer_parameters(source.config, layer):
        if not model.EXPERT.search(name):
            tensors |= converted(source, name, shape)
    report = {
        "layer": layer,
        "attention": layout.COMPRESS_RATIOS[source.config.compress_ratios[layer]],
        "method": settings.method,
        "fingerprint": digest,
        **experts.report,
    }
    write_json(layer_report(work, layer), report)
    write_shard(layer_file(work, layer), tensors, {"fingerprint": digest})
