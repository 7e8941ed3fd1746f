"""model.attention against its definition in float64, in pieces, beside other samples, and with a gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plain_mtp import distance
from torch import Tensor

from v4forge.model import attention

BATCH, HEADS, SEQ, KEYS, WIDTH = 3, 4, 40, 50, 64
Inputs = tuple[SimpleNamespace, Tensor, Tensor, Tensor]


@pytest.fixture
def inputs() -> Inputs:
    """Sinks, queries and keys in BF16, and a mask that leaves each query a few keys. Logits are of the order of 30."""
    generator = torch.Generator().manual_seed(1)
    query = 5 * torch.randn(BATCH, HEADS, SEQ, WIDTH, generator=generator)
    keys = 5 * torch.randn(BATCH, 1, KEYS, WIDTH, generator=generator)
    hidden = torch.rand(BATCH, 1, SEQ, KEYS, generator=generator) < 0.5
    hidden[..., 0] = False
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.bfloat16).min)
    mask[..., -5:] = -torch.inf  # as for compressed keys that lie ahead
    sinks = SimpleNamespace(sinks=torch.randn(HEADS, generator=generator))
    return sinks, query.bfloat16(), keys.bfloat16(), mask.bfloat16()


def ours(inputs: Inputs) -> Tensor:
    module, query, keys, mask = inputs
    return attention.attention(module, query, keys, keys, mask, WIDTH**-0.5)[0]


def defined(inputs: Inputs) -> Tensor:
    """Softmax over the keys and the sink, whose probability goes nowhere."""
    module, query, keys, mask = inputs
    logits = query.double() @ keys.double().mT / WIDTH**0.5 + mask.double()
    sinks = module.sinks.double().view(1, -1, 1, 1).expand(len(query), -1, query.shape[2], 1)
    return (torch.cat((logits, sinks), -1).softmax(-1)[..., :-1] @ keys.double()).transpose(1, 2)


def test_attention_equals_its_definition_up_to_the_rounding_of_what_it_gives(inputs: Inputs) -> None:
    """Logits rounded to BF16, an eighth apart at 30, would be off by 0.03."""
    found = ours(inputs)
    assert found.dtype == torch.bfloat16 and found.shape == (BATCH, SEQ, HEADS, WIDTH)
    assert distance(found, defined(inputs)) < 4e-3
    module, *tensors = inputs
    assert distance(ours((module, *(each.float() for each in tensors))), defined(inputs)) < 1e-6


def test_pieces_of_a_sample_give_the_whole(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ours(inputs)
    monkeypatch.setattr(attention, "LOGITS", 7 * HEADS * KEYS)  # seven queries at a time
    assert distance(ours(inputs), whole) < 1e-3


def test_a_sample_has_the_same_bits_whatever_goes_with_it(inputs: Inputs) -> None:
    module, *tensors = inputs
    alone = [ours((module, *(each[i : i + 1] for each in tensors))) for i in range(BATCH)]
    assert torch.equal(torch.cat(alone), ours(inputs))


def test_a_mask_of_one_sample_is_that_of_all(inputs: Inputs) -> None:
    module, query, keys, mask = inputs
    assert torch.equal(
        ours((module, query, keys, mask[:1])), ours((module, query, keys, mask[:1].expand(BATCH, -1, -1, -1)))
    )


def test_a_gradient_goes_through(inputs: Inputs) -> None:
    module, *tensors = inputs
    leaves = [each.double().float().requires_grad_() for each in tensors[:2]]
    ours((module, *leaves, tensors[2])).square().sum().backward()
    exact = [each.double().requires_grad_() for each in tensors[:2]]
    defined((module, *exact, tensors[2])).square().sum().backward()
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and wanted.grad is not None
        assert distance(leaf.grad, wanted.grad) < 1e-4
