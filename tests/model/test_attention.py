"""model.attention against its definition in float64, in pieces, by windows, beside other samples, with a gradient."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import attention_cases
import pytest
import torch
from attention_cases import Form
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


# batch, heads, tokens, width, window, tokens to a compressed key, whether an indexer has chosen
WINDOWS = {
    "sliding": Form(2, 3, 70, 32, 16),
    "within one window": Form(1, 2, 9, 16, 16),
    "a window of all": Form(1, 2, 40, 16, 128),
    "compressed": Form(2, 4, 83, 32, 16, 4),
    "chosen": Form(2, 4, 83, 32, 16, 4, True),
    "heavily compressed": Form(2, 2, 300, 32, 128, 128),
    "too short to be compressed": Form(2, 2, 100, 16, 128, 128),
}


@pytest.mark.parametrize("form", WINDOWS)
def test_attention_by_windows_is_the_definition_and_the_eager_one(form: str) -> None:
    case = attention_cases.inputs(WINDOWS[form])
    found = case.by_windows()
    assert found.dtype == torch.bfloat16 and found.shape == case.query.transpose(1, 2).shape
    assert distance(found, case.exact()) < 4e-3
    assert distance(found, case.eager()) < 4e-3
    plain = attention_cases.inputs(WINDOWS[form], dtype=torch.float32)
    assert distance(plain.by_windows(), plain.exact()) < 1e-6


def test_no_piece_of_attention_by_windows_has_more_keys_than_windows_and_compressed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, met = attention_cases.inputs(Form(1, 2, 400, 16, 16, 8)), []
    some = attention._some
    monkeypatch.setattr(attention, "_some", lambda q, keys, *rest: met.append(keys.shape[1]) or some(q, keys, *rest))
    case.by_windows()
    assert sum(met) < 400 / 16 * (2 * 16 + 50) and max(met) < 2 * 16 + 50


def test_by_windows_a_sample_has_the_same_bits_whatever_goes_with_it() -> None:
    case = attention_cases.inputs(WINDOWS["chosen"])
    alone = [
        replace(case, query=case.query[i : i + 1], key=case.key[i : i + 1], bias=case.bias[i : i + 1]).by_windows()
        for i in range(2)
    ]
    assert torch.equal(torch.cat(alone), case.by_windows())


def test_a_gradient_goes_through_windows() -> None:
    case = attention_cases.inputs(WINDOWS["compressed"], dtype=torch.float32)
    grads = []
    for dtype, way in ((torch.float32, "by_windows"), (torch.float64, "exact")):
        query, key = (each.to(dtype).detach().requires_grad_() for each in (case.query, case.key))
        getattr(replace(case, query=query, key=key), way)().square().sum().backward()
        grads.append((query.grad, key.grad))
    for found, wanted in zip(*grads, strict=True):
        assert found is not None and wanted is not None
        assert distance(found, wanted) < 1e-4
