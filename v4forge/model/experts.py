"""The routed experts of a checkpoint, some at a time, decoded from what is stored of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from v4forge.checkpoint.codec import CodecError, decode_fp4, decode_int4_stack
from v4forge.checkpoint.formats import PARTS, Shape
from v4forge.checkpoint.layout import stored_name
from v4forge.checkpoint.prefetch import Group
from v4forge.checkpoint.reader import Checkpoint


def _finite(weight: Tensor) -> Tensor:
    if not bool(weight.isfinite().all()):
        raise CodecError("the weight holds NaN or Inf")
    return weight


# format of a routed expert -> its stacked parts to [n, out, in] bf16
DECODERS: dict[str, Callable[..., Tensor]] = {
    "fp4": decode_fp4,
    "mxfp4": decode_fp4,
    "int4": decode_int4_stack,
    "bf16": _finite,
}


def _matrices(checkpoint: Checkpoint, prefix: str, numbers: Sequence[int]) -> list[tuple[list[str], Shape, str]]:
    """Names, shape and format of some experts' w1 and w3, in turn, and of their w2."""
    inner, hidden = checkpoint.config.moe_intermediate_size, checkpoint.config.hidden_size
    alike = {("w1", "w3"): (inner, hidden), ("w2",): (hidden, inner)}
    form = checkpoint.format_of(f"{prefix}ffn.experts.0.w1.weight")
    return [
        ([f"{prefix}ffn.experts.{e}.{which}.weight" for e in numbers for which in kinds], shape, form)
        for kinds, shape in alike.items()
    ]


def stored_order(checkpoint: Checkpoint, prefix: str, numbers: Sequence[int]) -> list[str]:
    """The stored tensors of some experts of the block `prefix`, alike ones together, so that they decode as one."""
    return [
        stored_name(name, part)
        for names, shape, form in _matrices(checkpoint, prefix, numbers)
        for part in PARTS[form](shape)
        for name in names
    ]


def decoded(checkpoint: Checkpoint, prefix: str, numbers: Sequence[int], group: Group) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2 * inner, hidden] and down [E, hidden, inner] bf16, from a group read in `stored_order`.

    Raises UserError, naming the tensor, for what does not decode.
    """
    both = []
    for names, shape, form in _matrices(checkpoint, prefix, numbers):
        stacks = [group.stacked([stored_name(n, part) for n in names]) for part in PARTS[form](shape)]
        try:
            weights = DECODERS[form](*stacks)
        except CodecError:
            held = checkpoint.holding(group.tensors())
            for name in names:
                held.load(name, shape)  # says which
            raise
        both.append(weights.unflatten(0, (len(numbers), -1)).flatten(1, 2))
    return both[0], both[1]
