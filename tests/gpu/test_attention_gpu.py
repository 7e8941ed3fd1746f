"""Attention's kernel at DeepSeek-V4-Flash's widths, against float64 and the torch code, and what it holds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import attention_cases
from attention_cases import Form
from kernel_cases import attended

from v4forge.model import kernels
from v4forge.units import MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
FORMS = {
    "sliding": Form(2, 64, 512, 512, 128),
    "compressed by 4": Form(2, 64, 512, 512, 128, 4),
    "chosen": Form(1, 64, 700, 512, 128, 4, True),
    "compressed by 128": Form(2, 64, 1000, 512, 128, 128),
    "too short": Form(3, 64, 100, 512, 128, 128),
    "tiny": Form(2, 4, 333, 64, 128, 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_the_exact_one_rounded(form: str) -> None:
    assert attended(FORMS[form]) < 4e-3


def test_the_layers_get_the_kernel_and_what_the_torch_code_gives() -> None:
    case = attention_cases.inputs(FORMS["chosen"], device="cuda")
    assert kernels.attends(case.query, case.key, case.key)
    found, eager = case.by_windows(), case.eager()
    assert float((found.double() - eager.double()).norm() / eager.double().norm()) < 4e-3


def test_a_sample_has_the_same_bits_whatever_goes_with_it_and_every_time() -> None:
    case = attention_cases.inputs(FORMS["compressed by 4"], device="cuda")
    both = case.by_windows()
    assert torch.equal(both, case.by_windows())
    given = (case.query[1:], case.key[1:], case.bias[1:], case.module.sinks, case.scaling, case.window, 4)
    assert torch.equal(kernels.attended(*given), both[1:])


def test_long_samples_take_the_memory_of_what_comes_out() -> None:
    case = attention_cases.inputs(Form(1, 64, 8192, 512, 128, 4), device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = case.by_windows()
    assert torch.cuda.max_memory_allocated() - before < found.nbytes + MIB
