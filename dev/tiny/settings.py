"""How the embedded model is trained: the settings of dev.train_tiny, which offers them without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Of the training; the defaults made models/tiny."""

    steps: int = 1400
    batch: int = 32
    seq_len: int = 512
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.4
    warmup: int = 150
    mtp_weight: float = 0.5
    quantized_from: float = 0.5  # share of the steps after which weights are rounded to FP4 and FP8
    bias_step: float = 2e-3  # of the router bias, towards equal load (DeepSeek-V3 report, section 2.1.2)
    seed: int = 0
