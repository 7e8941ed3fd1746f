"""A checkpoint on its way over tokens, one layer in memory, its bytes read ahead: evaluation runs several abreast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from v4forge.checkpoint import layout
from v4forge.checkpoint.prefetch import Reader
from v4forge.checkpoint.reader import Checkpoint
from v4forge.errors import UserError
from v4forge.model import deepseek_v4, experts
from v4forge.model import mtp as model_mtp
from v4forge.model.distributed import Ranks
from v4forge.model.expert_dispatch import Dispatch
from v4forge.profiling import Watch

GROUP_BYTES = 256 << 20  # of experts that are read and decoded together
LAYOUTS = {"source": layout.upstream, "artifact": layout.artifact}
HINTS = {
    "source": "check the source: python -m scripts.fetch --help",
    "artifact": "check the artifact: python -m scripts.verify --help",
}


class Forward:
    """One checkpoint's forward pass over micro-batches of tokens, [batch, seq] int64 each on `device`.

    Made, it holds the root and the embedded tokens; then `layer` is called for each index in order, then `mtp`.
    `streams`: one [batch, seq, hc_mult, hidden] bf16 a micro-batch. A context manager, for its Reader, which reads at
    most `ahead` bytes in advance. Raises UserError for a broken checkpoint and for numbers that are not finite.
    """

    def __init__(
        self, checkpoint: Checkpoint, batches: Sequence[Tensor], device: torch.device, ahead: int, watch: Watch
    ) -> None:
        checkpoint.validate(LAYOUTS[checkpoint.form](checkpoint.config))
        self.checkpoint, self.batches, self.device, self.watch = checkpoint, batches, device, watch
        self.config = deepseek_v4.hf_config(checkpoint.config)
        self.rotary = deepseek_v4.Rotary(self.config, device, torch.bfloat16)
        self._reader = Reader(checkpoint, list(self._groups()), ahead, device, watch)
        try:
            groups = len(list(layout.root_parameters(checkpoint.config)))
            self.root = deepseek_v4.load_root(self._weights(groups), self.config)
            self.streams = [deepseek_v4.embed(self.root, self.config, batch) for batch in batches]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.__exit__()

    def _groups(self) -> Iterator[tuple[int, list[str]]]:
        """What is read, in this order: the root's tensors, each alone; each block's frame, then its experts."""
        config = self.checkpoint.config
        for parameter in layout.root_parameters(config):  # a small tensor would keep a large one's buffer
            yield -1, self._stored([parameter])
        blocks = [(i, f"layers.{i}.", layout.layer_parameters(config, i)) for i in config.layers]
        for index, prefix, parameters in [*blocks, (config.num_hidden_layers, "mtp.0.", layout.mtp_parameters(config))]:
            yield index, self._stored((n, s) for n, s in parameters if not deepseek_v4.EXPERT.search(n))
            for numbers in self._steps(prefix):
                yield index, experts.stored_order(self.checkpoint, prefix, numbers)

    def _stored(self, parameters: Any) -> list[str]:
        return [stored for n, s in parameters for stored in layout.stored(n, s, self.checkpoint.format_of(n))]

    def _steps(self, prefix: str) -> list[range]:
        """Which experts are read and decoded together."""
        count = self.checkpoint.config.n_routed_experts
        names = experts.stored_order(self.checkpoint, prefix, [0])
        specs = [self.checkpoint.spec(name) for name in names]
        step = max(1, GROUP_BYTES // sum(spec.bytes for spec in specs))
        return [range(start, min(start + step, count)) for start in range(0, count, step)]

    def _weights(self, groups: int = 1) -> deepseek_v4.Weights:
        """A view of the checkpoint that holds the next groups, on the device."""
        held: dict[str, Tensor] = {}
        for _ in range(groups):
            held |= next(self._reader).on(self.device).tensors()
        return deepseek_v4.Weights(self.checkpoint.holding(held), self.device)

    def _experts(self, prefix: str) -> Iterator[tuple[range, tuple[Tensor, Tensor]]]:
        """Some experts after the others: their numbers, gate_up and down."""
        for numbers in self._steps(prefix):
            with self.watch.compute("decode"):
                group = next(self._reader).on(self.device)
                both = experts.decoded(self.checkpoint, prefix, numbers, group)
            yield numbers, both

    def layer(self, index: int) -> None:
        """Takes `streams` through decoder layer `index`."""
        with self.watch.compute("decode"):
            module = deepseek_v4.load_layer(self._weights(), self.config, index, experts=False)
        with self.watch.compute("attention"):
            attended = [
                deepseek_v4.attend(module, self.streams.pop(0), self.rotary.context(batch)) for batch in self.batches
            ]
        with self.watch.compute("experts"):
            x = torch.cat([each.x for each in attended])
            indices = torch.cat([each.indices for each in attended])
            dispatch = Dispatch(Ranks(), x, indices, self.checkpoint.config.n_routed_experts)
        limit = float(self.config.swiglu_limit)
        for numbers, (gate_up, down) in self._experts(f"layers.{index}."):
            with self.watch.compute("experts"):
                rows = dispatch.rows([numbers])
                outputs = [deepseek_v4.expert(r, gate_up[i], down[i], limit) for i, r in enumerate(rows)]
                dispatch.give_back(outputs)
        with self.watch.compute("experts"):
            routed = dispatch.routed.split([each.indices.numel() for each in attended])
            for each, part in zip(attended, routed, strict=True):
                self.streams.append(deepseek_v4.combine(each, deepseek_v4.weighted_sum(part, each.weights)))
                each.carried = each.x  # frees the streams that have been used
        self.refuse_nan(self.streams, f"layer {index}")

    def mtp(self) -> model_mtp.MTPBlock:
        """The MTP block, with all its experts."""
        c = self.checkpoint.config
        with self.watch.compute("decode"):
            weights = self._weights()
        new: dict[str, Any] = {"dtype": torch.bfloat16, "device": self.device}
        gate_up = torch.empty(c.n_routed_experts, 2 * c.moe_intermediate_size, c.hidden_size, **new)
        down = torch.empty(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, **new)
        for numbers, both in self._experts("mtp.0."):
            gate_up[numbers.start : numbers.stop], down[numbers.start : numbers.stop] = both
        return model_mtp.load_mtp(weights, self.config, (gate_up, down))

    def refuse_nan(self, tensors: Sequence[Tensor], what: str) -> None:
        """Raises UserError when what a part of the model puts out is not finite."""
        if not bool(torch.stack([each.isfinite().all() for each in tensors]).all()):
            form = self.checkpoint.form
            raise UserError(f"{what} of {self.checkpoint.directory} puts out NaN or Inf", HINTS[form])
