"""What verify holds an artifact to, and the measured values that each bound stands above."""

from __future__ import annotations

# ||W - Q|| / ||W|| of an INT4 g128 matrix against its source: on models/tiny at most 0.11 for round-to-nearest and 0.12
# for GPTQ, 0.15 for GPTQ on absmax scales (it trades weight error for output error). A zeroed or permuted matrix has 1
# or more.
INT4_RELATIVE_ERROR = 0.30
# <q, w> / <w, w> of each group of 128 weights: 0.91 to 1.06 on models/tiny, 0.78 to 1.14 seen on good GPTQ output. A
# doubled row or a group's scale that is off by 2 has 0.5 or 2.
GROUP_SLOPES = (0.7, 1.3)
# Share of a layer's codes that differ from the nearest ones at the same scales: 0 for round-to-nearest, 4% to 8% for
# GPTQ on models/tiny.
MOVED_CODES = 0.01
DISTINCT_CODES = 8  # at least, in a matrix; good output uses all 16
# --deep, beside the source on the same tokens; models/tiny, 8,192 tokens: GPTQ, round-to-nearest. A check fails when
# the whole 95% interval lies beyond the bound, so that few tokens do not fail a good artifact.
PERPLEXITY_PERCENT = 3.0  # -0.04, +1.07
KL_NATS = 0.04  # per token: 0.013, 0.023
AGREEMENT = 0.85  # share of tokens with the same most likely one: 0.938, 0.918
ACCEPTANCE_LOST = 0.03  # of the MTP block's first drafts, as a share: -0.001, -0.001
# A run repeated on other hardware, versions or numbers of GPUs: batched products round otherwise, and a code near a tie
# falls the other way. 1, 2 and 4 H200: all codes and losses equal; GPTQ beside llm-compressor's on one H200: 97.1% of
# the codes.
REPLAY_EQUAL_CODES = 0.97  # of a layer's codes
REPLAY_LOSS_OFF = 0.002  # relative difference of a layer's mean loss
