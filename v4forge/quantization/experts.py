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

from v4forge.checkpoint.codec import decode_int4, encode_int4
from v4forge.checkpoint.layout import Config
from v4forge.model import deepseek_v4
from v4forge.profiling import Watch
from v4forge.quantization import gptq
from v4forge.quantization.layer_files import Settings, layer_file

SCALES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "searched": gptq.searched_scales,
    "absmax": lambda weights, _importance: gptq.absmax_scales(weights),
}
SAMPLE_FACTOR = 4  # tokens sampled for w2's common Hessian, in widths


@dataclass(frozen=True)
class Common:
    """What all tokens of the layer have in common, for experts that few of them reach."""

    hessian: Tensor  # [hidden, hidden] f32, the mean of x^T x over all tokens
    sample: Tensor  # [tokens, hidden], some of them


@dataclass(frozen=True)
class AllTokens:
    """The layer's tokens, where every one of them goes through every expert."""

    hessian: Tensor  # [1, hidden, hidden] f32, the mean of x^T x: of every expert
    x: Tensor  # [tokens, hidden]


@dataclass(frozen=True)
class Hessians:
    """Means of x^T x per expert: w1 and w3 share `hidden`, w2 has `inner`."""

    hidden: Tensor  # [E, hidden, hidden] f32, or [1, hidden, hidden] when every expert sees every token
    inner: Tensor  # [E, inner, inner] f32
    blended: list[dict[str, Any]]  # which were blended with all tokens', because theirs were too few


def hessians(
    rows: Sequence[Tensor], gate_up: Tensor, limit: float, shared: Common | AllTokens | None, numbers: Sequence[int]
) -> Hessians:
    """Hessians of the inputs of some experts. rows: their tokens, [n, hidden] each; gate_up: [E, 2 * inner, hidden],
    unquantized; shared: needed where an expert has fewer tokens than a width; numbers: the experts', for the notes.
    """
    if isinstance(shared, AllTokens):
        return Hessians(shared.hessian, torch.stack([_inner(shared.x, each, limit) for each in gate_up]), [])
    width, inner = gate_up.shape[2], gate_up.shape[1] // 2
    h_hidden = gate_up.new_empty(len(rows), width, width, dtype=torch.float32)
    h_inner = gate_up.new_empty(len(rows), inner, inner, dtype=torch.float32)
    notes = []
    for e, x in enumerate(rows):
        h_hidden[e] = gptq.gram(x) / max(len(x), 1)
        h_inner[e] = _inner(x, gate_up[e], limit)
        few = []
        if len(x) < width:
            assert shared is not None
            h_hidden[e] = gptq.blended(h_hidden[e], len(x), shared.hessian)
            few.append("w1, w3")
        if len(x) < inner:
            assert shared is not None
            h_inner[e] = gptq.blended(h_inner[e], len(x), _inner(shared.sample, gate_up[e], limit))
            few.append("w2")
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
    stored = {}
    for i, e in enumerate(numbers):
        for which, (kind, rows) in slots.items():
            base = f"layers.{layer}.ffn.experts.{e}.{which}"
            weight = packed[f"{kind}.weight_packed"][i, rows]
            stored[f"{base}.weight_packed"] = weight
            stored[f"{base}.weight_scale"] = packed[f"{kind}.weight_scale"][i, rows]
            stored[f"{base}.weight_shape"] = torch.tensor((len(weight), int(packed[f"{kind}.weight_shape"][1])))
    return stored


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
            importance = energies.diagonal(dim1=-2, dim2=-1).expand(len(weights), -1)
            scale = SCALES[settings.scales](weights, importance)
        with watch.compute("factorize"):
            factor = gptq.factorize(energies, settings.dampening)
        with watch.compute("sweep"):
            result, lost = gptq.sweep(weights, factor, scale)
        with watch.compute("errors"):
            if bool(factor.failed.any()):  # the sweep's loss knows only the diagonal then
                lost = gptq.energy(weights.float() - result.dequantized().float(), energies)
            total = gptq.energy(weights, energies)
            stock = gptq.energy(weights.float() - nearest(weights).dequantized().float(), energies)
            errors.append({"gptq": lost, "rtn": stock, "total": total})
        results.append(result)
        failed = factor.failed.expand(len(weights)).tolist()
        fallback += [f"{kind} of expert {e}" for e, bad in zip(numbers, failed, strict=True) if bad]
    with watch.compute("errors"):
        error = {}
        inner = gate_up.shape[1] // 2
        w1, w3 = slice(inner), slice(inner, None)
        for which, rows, part in (("w1", errors[0], w1), ("w2", errors[1], slice(None)), ("w3", errors[0], w3)):
            of = rows["total"][:, part].double().sum(1)
            error[which] = {
                method: torch.where(of > 0, rows[method][:, part].double().sum(1) / of, 0.0).tolist()
                for method in ("gptq", "rtn")
            }
    return Experts(results[0], results[1], error, fallback)


def read_experts(
    work: Path, config: Config, layer: int, experts: Iterable[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Some of a finished layer's experts as served: gate_up [E, 2 * inner, hidden], down [E, hidden, inner] bf16."""
    gate_up, down = [], []
    with safe_open(layer_file(work, layer), framework="pt") as file:

        def decoded(expert: int, which: str) -> Tensor:
            base = f"layers.{layer}.ffn.experts.{expert}.{which}"
            packed, scale = (file.get_tensor(f"{base}.{part}").to(device) for part in ("weight_packed", "weight_scale"))
            return decode_int4(packed, scale, file.get_tensor(f"{base}.weight_shape"))

        for e in experts:
            gate_up.append(torch.cat((decoded(e, "w1"), decoded(e, "w3"))))
            down.append(decoded(e, "w2"))
    return torch.stack(gate_up), torch.stack(down)
