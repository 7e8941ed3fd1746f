"""Which parameters a load of weights has left as they were allocated, and the error that stops vLLM for it.

vLLM's own check is off for quantized models, and a parameter that is fused from several tensors counts as loaded with
the first of them. A draft model whose head or embedding is left so has an acceptance of 0%, and nothing says why.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# Tensors of a checkpoint that vLLM fuses into one parameter, besides those of the routed experts.
FUSED = (("attn.wq_a", "attn.wkv"), ("compressor.wkv", "compressor.wgate"), ("shared_experts.w1", "shared_experts.w3"))
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
NAMED = 3  # of what is missing, in a message
# A child of vLLM's own logger, so that what it says appears in the server's log.
LOGGER = logging.getLogger("vllm.v4forge")


class UninitializedWeightsError(RuntimeError):
    """Parameters would be served as they were allocated."""

    def __init__(self, what: str, missing: Iterable[str]) -> None:
        names = sorted(missing)
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        super().__init__(
            f"{what} would be served with uninitialized weights: {', '.join(names[:NAMED])}{more} (hint: python -m "
            "scripts.verify --artifact DIR says what it lacks; without --speculative-config no MTP block is needed)"
        )


@dataclass
class Guard:
    """Watches the first load of a model; later ones may update a part.

    `experts`: how many routed experts a layer must get, 0 where each rank reads its own; `prefix`: what the model's
    tensors begin with in the checkpoint; `shared`: ends of the names of modules that vLLM may replace afterwards.
    """

    what: str
    prefix: str
    experts: int
    shared: tuple[str, ...] = ()
    done: bool = False

    @classmethod
    def of(cls, vllm_config: Any, what: str, prefix: str, shared: tuple[str, ...] = ()) -> Guard:
        every = not vllm_config.parallel_config.enable_expert_parallel
        experts = vllm_config.model_config.hf_config.n_routed_experts if every else 0
        return cls(what, prefix, experts, shared)

    def load(
        self,
        model: nn.Module,
        load: Callable[[Iterable[tuple[str, Tensor]]], set[str]],
        weights: Iterable[tuple[str, Tensor]],
    ) -> set[str]:
        """What `load` returns for `weights`. Raises UninitializedWeightsError, now or in the first forward pass."""
        if self.done:
            return load(weights)
        names: set[str] = set()
        loaded = load(_noted(weights, names))
        self.done = True

        empty = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name not in loaded}
        later = {name for name in empty if name.endswith(self.shared)} if self.shared else set()
        names = {name for name in names if name.startswith(self.prefix)}
        missing = (empty - later) | set(torn(names, self.experts))
        if missing:
            raise UninitializedWeightsError(self.what, missing)
        whole = f"all {sum(1 for _ in model.parameters())} parameters filled from {len(names)} tensors"
        if later:
            self._look_at_first_forward(model, {name: model.get_submodule(name) for name in later}, whole)
        else:
            self._say(whole)
        return loaded

    def _say(self, whole: str) -> None:
        """The line that `make serve` looks for in the log of every replica."""
        LOGGER.info("v4forge: %s: %s", self.what, whole)

    def _look_at_first_forward(self, model: nn.Module, modules: dict[str, nn.Module], whole: str) -> None:
        def look(model: nn.Module, _: Any) -> None:
            handle.remove()
            if left := [name for name, module in modules.items() if model.get_submodule(name) is module]:
                raise UninitializedWeightsError(self.what, left)
            self._say(whole)

        handle = model.register_forward_pre_hook(look)


def _noted(weights: Iterable[tuple[str, Tensor]], names: set[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        names.add(name)
        yield name, tensor


def torn(names: set[str], experts: int) -> Iterator[str]:
    """The tensors that are missing among `names` for a parameter fused of several: the other one of a pair, the other
    matrices of an expert, and with `experts` > 0 the other experts of a layer."""
    for one, other in (pair for a, b in FUSED for pair in ((a, b), (b, a))):
        partners = (name.replace(f".{one}.", f".{other}.") for name in names if f".{one}." in name)
        yield from (partner for partner in partners if partner not in names)

    kinds, numbers = defaultdict(set), defaultdict(set)
    for match in filter(None, map(EXPERT.fullmatch, names)):
        kinds[match[1]].add(match[3])
        numbers[match[1]].add(int(match[2]))
    for layer in kinds:
        for number in numbers[layer] | set(range(experts)):
            yield from (wanted for kind in kinds[layer] if (wanted := f"{layer}.{number}.{kind}") not in names)
