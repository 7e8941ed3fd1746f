"""A few routed experts of one layer: Hessians of their inputs, quantization, what it loses, and how they are served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from v4forge.checkpoint.codec import DECODERS, encode_int4
from v4forge.checkpoint.conversion import converted
from v4forge.checkpoint.layout import Config, stored
from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import deepseek_v4
from v4forge.profiling import Watch
from v4forge.quantization import gptq, peer_gptq
from v4forge.quantization.layer_files import LOST, Settings, layer_file

SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "searched": gptq.searched_scales,
    "absmax": lambda weights, _importance: gptq.absmax_scales(weights),
}
SAMPLE_FACTOR = 2  # tokens sampled for w2's common Hessian, in widths
ERROR_ROWS = 8  # of so many rows of a matrix one is looked at for what is lost


@dataclass(frozen=True)
class Common:
    """What all tokens of the layer have in common, which is a part of every expert's Hessians."""

    hessian: Tensor  # [hidden, hidden] f32, the mean of x^T x over all tokens
    sample: Tensor  # [tokens, hidden], some of them


@dataclass(frozen=True)
class AllTokens:
    """The layer's tokens, where every one of them goes through every expert."""

    hessian: Tensor  # [1, hidden, hidden] f32, the mean of x^T x: of every expert
    x: Tensor  # [tokens, hidden]


Shared = Common | AllTokens


@dataclass(frozen=True)
class Hessians:
    """Means of x^T x per expert: w1 and w3 share `hidden`, w2 has `inner`."""

    hidden: Tensor  # [E, hidden, hidden] f32, or [1, hidden, hidden] when every expert sees every token
    inner: Tensor  # [E, inner, inner] f32
    blended: list[dict[str, Any]]  # of experts with fewer tokens than inputs, more of all tokens' than of their own


def hessians(rows: Sequence[Tensor], gate_up: Tensor, limit: float, shared: Shared, numbers: Sequence[int]) -> Hessians:
    """Hessians of the inputs of some experts. rows: their tokens, [n, hidden] each; gate_up: [E, 2 * inner, hidden],
    unquantized; numbers: the experts', for the notes.
    """
    if isinstance(shared, AllTokens):
        return Hessians(shared.hessian, torch.stack([_inner(shared.x, each, limit) for each in gate_up]), [])
    width, inner = gate_up.shape[2], gate_up.shape[1] // 2
    h_hidden = gate_up.new_empty(len(rows), width, width, dtype=torch.float32)
    h_inner = gate_up.new_empty(len(rows), inner, inner, dtype=torch.float32)
    notes = []
    for e, x in enumerate(rows):
        h_hidden[e] = gptq.blended(gptq.gram(x) / max(len(x), 1), len(x), shared.hessian)
        h_inner[e] = gptq.blended(_inner(x, gate_up[e], limit), len(x), _inner(shared.sample, gate_up[e], limit))
        few = [inputs for inputs, needed in (("w1, w3", width), ("w2", inner)) if len(x) < needed]
        if few:
            notes.append({"expert": numbers[e], "tokens": len(x), "inputs": ", ".join(few)})
    return Hessians(h_hidden, h_inner, notes)


def _inner(x: Tensor, gate_up: Tensor, limit: float) -> Tensor:
    return gptq.gram(deepseek_v4.activation(F.linear(x, gate_up), limit)) / max(len(x), 1)


@dataclass(frozen=True)
class Experts:
    """Some quantized routed experts: w1 and w3 stacked as `gate_up`, w2 as `down`, and what is said of them."""

    gate_up: gptq.Quantized
    down: gptq.Quantized
    error: dict[str, dict[str, list[float]]]  # relative Hessian-weighted error by matrix and method, an expert each
    fallback: list[str]  # matrices rounded to nearest, because their Hessian could not be factorized

    def packed(self) -> dict[str, Tensor]:
        """The bytes to be stored, still stacked by expert, on the device; `named` takes them apart."""
        both = {"gate_up": self.gate_up, "down": self.down}
        return {f"{kind}.{part}": t for kind, q in both.items() for part, t in encode_int4(q.codes, q.scale).items()}


def named(packed: Mapping[str, Tensor], layer: int, numbers: Sequence[int]) -> dict[str, Tensor]:
    """What `packed` gave, under the artifact's names; numbers: the experts'."""
    inner = packed["gate_up.weight_packed"].shape[1] // 2
    slots = {"w1": ("gate_up", slice(inner)), "w2": ("down", slice(None)), "w3": ("gate_up", slice(inner, None))}
    found = {}
    for i, e in enumerate(numbers):
        for which, (kind, rows) in slots.items():
            base = f"layers.{layer}.ffn.experts.{e}.{which}"
            weight = packed[f"{kind}.weight_packed"][i, rows]
            found[f"{base}.weight_packed"] = weight
            found[f"{base}.weight_scale"] = packed[f"{kind}.weight_scale"][i, rows]
            found[f"{base}.weight_shape"] = torch.tensor((len(weight), int(packed[f"{kind}.weight_shape"][1])))
    return found


def kept(source: Checkpoint, layer: int, numbers: Iterable[int]) -> dict[str, Tensor]:
    """The artifact's tensors of some experts of which the recipe keeps upstream's bytes, which `source` holds."""
    matrices = matrix_shapes(source.config, layer, numbers)
    return {name: tensor for each, shape in matrices.items() for name, tensor in converted(source, each, shape).items()}


def matrix_shapes(config: Config, layer: int, numbers: Iterable[int]) -> dict[str, tuple[int, int]]:
    """Some experts' matrices with their shapes, [out, in]; w1, w2 and w3 of each in turn."""
    up = (config.moe_intermediate_size, config.hidden_size)
    shapes = {"w1": up, "w2": up[::-1], "w3": up}
    return {f"layers.{layer}.ffn.experts.{e}.{which}.weight": shape for e in numbers for which, shape in shapes.items()}


def nearest(weights: Tensor) -> gptq.Quantized:
    """Stock round-to-nearest, with absmax scales."""
    return gptq.round_to_nearest(weights, gptq.absmax_scales(weights))


def quantize(
    gate_up: Tensor, down: Tensor, h: Hessians | None, settings: Settings, numbers: Sequence[int], watch: Watch
) -> Experts:
    """gate_up: [E, 2 * inner, hidden]; down: [E, hidden, inner]; numbers: the experts' -> INT4.

    Without Hessians round-to-nearest.
    """
    if h is None:
        with watch.compute("sweep"):
            return Experts(nearest(gate_up), nearest(down), {}, [])
    results, fallback, errors = [], [], []
    for weights, energies, kind in ((gate_up, h.hidden, "w1, w3"), (down, h.inner, "w2")):
        with watch.compute("scales"):
            diagonal = energies.diagonal(dim1=-2, dim2=-1) + gptq.damp_of(energies, settings.dampening).unsqueeze(-1)
            importance = diagonal.expand(len(weights), -1)
            scale = SCALES[settings.scales](weights, importance)
        if settings.engine == "llmcompressor":
            with watch.compute("sweep"):
                result, failed = peer_gptq.quantized(weights, energies, scale, settings.dampening)
        else:
            with watch.compute("factorize"):
                factor = gptq.factorize(energies, settings.dampening)
            with watch.compute("sweep"):
                result, failed = gptq.sweep(weights, factor, scale), factor.failed.expand(len(weights))
        if settings.scales == "searched":
            with watch.compute("refit"):
                better = gptq.refit(weights, result, energies, settings.dampening)
                result = gptq.Quantized(result.codes, torch.where(failed.view(-1, 1, 1), scale, better.scale))
        with watch.compute("errors"):
            errors.append(_lost(weights, result, scale, energies))
        results.append(result)
        fallback += [f"{kind} of expert {e}" for e, bad in zip(numbers, failed.tolist(), strict=True) if bad]
    with watch.compute("errors"):
        error = {}
        inner = gate_up.shape[1] // 2
        for which, rows, part in (
            ("w1", errors[0], slice(inner // ERROR_ROWS)),
            ("w2", errors[1], slice(None)),
            ("w3", errors[0], slice(inner // ERROR_ROWS, None)),
        ):
            total, *lost = (each[:, part].double().sum(1) for each in rows)
            error[which] = {
                method: torch.where(total > 0, each / total, 0.0).tolist()
                for method, each in zip(LOST, lost, strict=True)
            }
    return Experts(results[0], results[1], error, fallback)


def _lost(weights: Tensor, found: gptq.Quantized, scale: Tensor, hessians: Tensor) -> list[Tensor]:
    """What some rows' outputs are, and what each way of LOST loses of them: energies [E, rows] f32."""
    some, steps = weights[:, ::ERROR_ROWS], scale[:, ::ERROR_ROWS]
    ways = (
        gptq.Quantized(found.codes[:, ::ERROR_ROWS], found.scale[:, ::ERROR_ROWS]),
        nearest(some),
        gptq.round_to_nearest(some, steps),
    )
    left = (some.float() - way.dequantized().float() for way in ways)
    return [gptq.energy(some, hessians), *(gptq.energy(each, hessians) for each in left)]


def read_experts(
    work: Path, config: Config, layer: int, experts: Iterable[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Some of a finished layer's experts as served: gate_up [E, 2 * inner, hidden], down [E, hidden, inner] bf16."""
    decoded = []
    with safe_open(layer_file(work, layer), framework="pt") as file:
        for name, shape in matrix_shapes(config, layer, experts).items():
            form = config.rule_for(name).artifact
            parts = [file.get_tensor(part).to(device) for part in stored(name, shape, form)]
            decoded.append(DECODERS[form](*parts))
    gate_up = [torch.cat(both) for both in zip(decoded[::3], decoded[2::3], strict=True)]
    return torch.stack(gate_up), torch.stack(decoded[1::3])
