"""model.drafts: all positions at once against a server that drafts from one, by the block's definition in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_mtp import PlainMTP, distance
from synthetic import write_checkpoint
from torch import Tensor

from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import deepseek_v4, drafts
from v4forge.model import mtp as model_mtp

CPU = torch.device("cpu")
WINDOW, SEQ_LEN, COUNT = 8, 23, 4
SEEDS = st.integers(0, 1 << 30)


@dataclass
class Case:
    """An MTP block in F32 with a short window, random streams of the main model, and its drafts."""

    checkpoint: Checkpoint
    root: deepseek_v4.Root
    rotary: deepseek_v4.Rotary
    mtp: model_mtp.MTPBlock
    tokens: Tensor
    streams: Tensor

    def propose(self, count: int, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        text = self.tokens if tokens is None else tokens
        return drafts.propose(self.mtp, self.root, self.rotary, self.streams[:, : text.shape[1]], text, count)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("drafts")
    config = write_checkpoint(directory, sliding_window=WINDOW)
    checkpoint = Checkpoint(directory)
    hf_config, weights = deepseek_v4.hf_config(config), deepseek_v4.Weights(checkpoint, CPU, torch.float32)
    generator = torch.Generator().manual_seed(1)
    return Case(
        checkpoint,
        deepseek_v4.load_root(weights, hf_config),
        deepseek_v4.Rotary(hf_config, CPU, torch.float32),
        model_mtp.load_mtp(weights, hf_config),
        torch.randint(config.vocab_size, (2, SEQ_LEN), generator=generator),
        torch.randn(2, SEQ_LEN, config.hc_mult, config.hidden_size, generator=generator),
    )


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, COUNT])
def test_drafts_are_those_of_a_server_that_drafts_from_one_position(case: Case, count: int) -> None:
    """The server's cache: rows of the main model up to t, then one row a draft, in one ordinary causal sequence."""
    plain, embed = PlainMTP(case.checkpoint), case.root.embed.double()
    found, last = case.propose(count)
    assert found.shape == (count, 2, SEQ_LEN - 1)
    for row in range(2):
        for t in (0, 1, WINDOW - 4, WINDOW - 3, WINDOW - 2, WINDOW - 1, WINDOW, 15, SEQ_LEN - 2):
            streams = case.streams[row, : t + 1].double()
            embeds = embed[case.tokens[row, 1 : t + 2]]
            for step in range(count):
                out, logits = plain(streams, embeds)
                assert int(found[step, row, t]) == int(logits[-1].argmax()), (row, t, step)
                streams, embeds = torch.cat((streams, out[-1:])), torch.cat((embeds, embed[logits[-1:].argmax(1)]))
            assert distance(last[row, t], out[-1]) < 5e-6, (row, t)


@torch.no_grad()
def test_the_first_step_is_the_block_in_its_ordinary_context(case: Case) -> None:
    following = case.rotary.context(case.tokens[:, 1:])
    streams = case.mtp(case.streams[:, :-1], case.root.embed[following.input_ids], following)
    assert torch.equal(case.propose(1)[1], streams)


@torch.no_grad()
def test_drafts_depend_on_no_later_token(case: Case) -> None:
    found, _ = case.propose(COUNT)
    shorter, _ = case.propose(COUNT, case.tokens[:, :15])
    assert torch.equal(found[:, :, :14], shorter)


@given(seed=SEEDS, count=st.integers(1, 4), seq=st.integers(5, 9), greedy=st.booleans(), prompted=st.booleans())
def test_a_draft_counts_when_the_text_followed_those_before_it(
    seed: int, count: int, seq: int, greedy: bool, prompted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drafted, tokens, choices = (
        torch.randint(2, shape, generator=generator) for shape in ((count, 3, seq - 1), (3, seq), (3, seq))
    )
    if greedy:
        choices[:, :-1] = tokens[:, 1:]
    prompts = torch.randint(4, (3,), generator=generator) if prompted else None
    found = drafts.judge(drafted, choices, tokens, prompts)
    for row in range(3):
        text, chosen = tokens[row].tolist(), [None, *choices[row].tolist()]  # chosen[p]: for position p
        judged, accepted, lost = [0] * count, [0] * count, 0
        first = int(prompts[row]) - 1 if prompts is not None else 0  # a server's first draft follows its first token
        for t in range(max(first, 0), seq - 1):
            for i in range(count):
                position = t + 2 + i
                if position > seq:  # the text ends before
                    break
                judged[i] += 1
                if int(drafted[i, row, t]) != chosen[position]:
                    break
                accepted[i] += 1
                if position < seq and text[position] != chosen[position]:
                    lost += 1
                    break
        assert found.judged[:, row].tolist() == judged
        assert found.accepted[:, row].tolist() == accepted
        assert not (greedy and lost)
