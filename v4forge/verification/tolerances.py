"""What verify holds an artifact to, and the measured values that each bound stands above."""

from __future__ import annotations

from dataclasses import dataclass

# ||W - Q|| / ||W|| of an INT4 g128 matrix against its source: on models/tiny at most 0.11 for round-to-nearest and 0.12
# for GPTQ, which trades weight error for output error: 0.77 on narrow matrices whose inputs and columns are of very
# different sizes. A zeroed matrix has 1, another one 1.4.
INT4_RELATIVE_ERROR = 0.80
# <q, w> / <w, w>, a mean over the groups of a row, or of a column of groups, weighted by their norms. No bound holds
# for a single group: one at 1/32 of its row takes up the row's errors (0.54), and where weights and inputs are
# heavy-tailed so may one that carries a quarter of its row (0.34). `recorded`, a SHA-256 of codes and scales, is for
# those.
SLOPES = (0.55, 1.7)
TOLERATED_ROWS = 1 / 200  # of a matrix, at either end: none of fewer than 200 rows, 10 of 2,048
COLUMN_SHARE = 0.5  # a column of groups counts from this part of the columns' mean norm: a faint one takes up errors
# Share of a layer's codes that differ from the nearest ones at the same scales: 0 for round-to-nearest, 0.5% for
# llm-compressor's, which divides in BF16; 4% to 8% for GPTQ on models/tiny, at least 2.7% on the hardest of matrices.
MOVED_CODES = 0.008
DISTINCT_CODES = 8  # at least, in a matrix; good output uses all 16
# --deep, beside the source on the same tokens; models/tiny, 8,192 tokens: GPTQ, round-to-nearest. A check fails when
# the whole 95% interval lies beyond the bound, so that few tokens do not fail a good artifact.
PERPLEXITY_PERCENT = 3.0  # -0.04, +1.07
KL_NATS = 0.04  # per token: 0.013, 0.023
AGREEMENT = 0.85  # share of tokens with the same most likely one: 0.938, 0.918
ACCEPTANCE_LOST = 0.03  # of the MTP block's first drafts, as a share: -0.001, -0.001
# Predicted tokens over which a passing `quality` makes a warning of what statistics found; --deep 8192 has more.
ENOUGH_TOKENS = 7500
# A run repeated on other hardware, versions or numbers of GPUs: products and inputs round otherwise, a code near a tie
# falls the other way, and all behind it in its row follow. 1, 2 and 4 H200: all codes and losses equal; an H200 beside
# a CPU: 97.3% of the codes and losses within 0.11%; GPTQ beside llm-compressor's on one H200: 97.1%. Inputs of low rank
# whose every value was rounded once more: 94.8%.
REPLAY_EQUAL_CODES = 0.85  # of a layer's codes
REPLAY_LOSS_OFF = 0.01  # relative difference of a layer's mean loss


@dataclass(frozen=True)
class Risk:
    """Both errors of a bound, for docs/verify.md. `chance`: that a good DeepSeek-V4-Flash fails it is at most this."""

    bound: str
    chance: float
    because: str
    weakest: str


# By check; those that are not here compare exactly. The chances of errors, slopes and rounding are what
# `benchmarks/verify_bounds.py` found for a Flash all of whose experts are of the worst of its kinds but UNBOUNDED.
UNBOUNDED = "columns of lognormal sizes"  # too few of these weights were measured to bound columns of slopes
RISKS = {
    "expert codes": Risk(
        f"{DISTINCT_CODES} of 16 codes in use",
        1e-9,
        "65,536 groups of a matrix would all have to avoid nine codes, and every search of scales fills the outer ones",
        "a matrix of one to seven values",
    ),
    "expert errors": Risk(
        f"relative error at most {INT4_RELATIVE_ERROR}",
        1e-9,
        "0.32 is the greatest, of heavy-tailed weights where some inputs are 100 times as large",
        "a third of a matrix's rows from another, a zeroed matrix, all scales off by 1.8",
    ),
    "expert slopes": Risk(
        f"{SLOPES[0]} to {SLOPES[1]}, but for 1 row in {round(1 / TOLERATED_ROWS)} at either end",
        1e-3,
        "means over a row's groups, and over a column's rows, of columns that are not faint",
        "11 rows of 2,048 with scales off by 2, one of fewer than 200; a column of groups off by 2",
    ),
    "rounding": Risk(
        f"GPTQ moves {MOVED_CODES:.1%} of a layer's codes",
        1e-6,
        "2.7% is the least, of heavy-tailed weights where hardly a token reaches: the refit moves scales, too",
        "a layer by round-to-nearest, of which none move, or 0.5% where another tool divided in BF16",
    ),
    "quality": Risk(
        f"perplexity +{PERPLEXITY_PERCENT:.0f}%, KL {KL_NATS} nats, agreement {AGREEMENT:.0%}, acceptance"
        f" -{ACCEPTANCE_LOST:.0%}; the whole 95% interval beyond",
        1e-5,
        "if it loses what round-to-nearest does on models/tiny; exactly on a bound, 2.5%, on all four at most 10%",
        "two standard errors beyond a bound: at 8,192 tokens perplexity +3.6%; 30% of all codes moved by one",
    ),
    "reproduce": Risk(
        f"{REPLAY_EQUAL_CODES:.0%} of a layer's codes equal, its loss within {REPLAY_LOSS_OFF:.0%}",
        1e-9,
        "means over a layer; the least for inputs of low rank, each value rounded once more",
        "a layer by another method; experts exchanged, few of whose codes are equal",
    ),
}
