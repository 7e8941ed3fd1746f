"""What is said when a GPU has no memory left: how much was asked for, and what asks for less."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from v4forge.errors import UserError

ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ \w+)")


@contextmanager
def explained(micro_batch_tokens: int, seq_len: int) -> Iterator[None]:
    """Within it, torch's error becomes a UserError: of samples of `seq_len` tokens, so many of which go together."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        asked = ASKED.search(str(error))
        together = max(micro_batch_tokens, seq_len)
        shorter = f"--seq-len {seq_len // 2}"
        less = f"--micro-batch-tokens {max(seq_len, together // 2)}" if together > seq_len else shorter
        raise UserError(
            f"a GPU has no room for {asked[1] if asked else 'a tensor'} more, with samples of {seq_len} tokens,"
            f" {together} in a forward pass",
            f"make … SEQ_LEN={seq_len // 2}, or more GPUS; without make, {less}",
        ) from error
