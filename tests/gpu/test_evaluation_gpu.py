"""Models are run on a GPU as on the CPU."""

from __future__ import annotations

import pytest
import torch
from synthetic import TINY

from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import evaluation, heldout

pytestmark = pytest.mark.gpu


def test_a_gpu_named_without_its_number_finds_the_perplexity_that_the_cpu_finds() -> None:
    source = Checkpoint(TINY)
    tokens = heldout.tokens(TINY, TINY / "heldout.txt", 4, 128, source.config.vocab_size)
    cpu, gpu = (evaluation.evaluate(source, tokens, torch.device(device)) for device in ("cpu", "cuda"))
    assert gpu.perplexity == pytest.approx(cpu.perplexity, rel=0.01)
    assert gpu.mtp_acceptance == pytest.approx(cpu.mtp_acceptance, abs=0.02)
