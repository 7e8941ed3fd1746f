"""benchmarks.serve: what it makes of a server's answers, and the whole program with a stand-in for vLLM that counts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import serve, serve_forward, serve_layers
from benchmarks.serve_client import Answer, Drafts, events, logged, tpot
from benchmarks.serve_figures import equal_runs
from v4forge.checkout import ROOT
from v4forge.checkpoint.reader import Checkpoint
from v4forge.model import evaluation
from v4forge.model.corpus import load_tokenizer

CPU = torch.device("cpu")
STAND_IN = ROOT / "tests/support/vllm_stand_in.py"


def test_time_per_token_is_of_those_behind_the_first_piece() -> None:
    assert tpot([(0.5, 1), (0.6, 2), (0.9, 2)]) == pytest.approx(100.0)


def test_a_stream_ends_with_done() -> None:
    lines = [b": ping\n", b"\n", b'data: {"n": 1}\n', b"\n", b"data: [DONE]\n", b'data: {"n": 2}\n']
    assert list(events(iter(lines[1:]))) == [{"n": 1}]


def test_the_log_tells_load_time_and_memory() -> None:
    log = (
        "INFO [default_loader.py:507] Loading weights took 3.25 seconds\n"
        "INFO [model_runner.py:429] Model loading took 12.5 GiB memory and 4.123456 seconds\n"
        "INFO [default_loader.py:507] Loading weights took 1.50 seconds\n"
    )
    assert logged(log) == {"weights_read_s": 1.5, "model_gib": 12.5, "model_loaded_s": 4.123456}
    assert logged("") == {}


def test_counters_are_told_by_request() -> None:
    assert Drafts(9, (7, 3)).since(Drafts(4, (4, 1))) == Drafts(5, (3, 2))
    assert Drafts(9, (7, 3)).since(Drafts(0, ())) == Drafts(9, (7, 3))


def test_alternatives_fill_up_with_the_written_token() -> None:
    answer = Answer([7, 8], [-0.1, -0.2], [{7: -0.1, 9: -3.0}, {8: -0.2}])
    ids, logprobs = serve_forward.alternatives([answer])
    assert ids.tolist() == [[[7, 7, 9], [8, 8, 8]]]
    assert logprobs.tolist() == [[[-0.1, -0.1, -3.0], [-0.2, -0.2, -0.2]]]


def test_equal_runs_are_counted_to_the_first_difference() -> None:
    found = equal_runs([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]])
    assert found == {"answers": 2, "whole": 1, "share_before_differing": 5 / 8}


@given(st.data())
def test_a_walk_counts_what_a_server_does(data: st.DataObject) -> None:
    """Against a server that writes one token after the other, with a queue of drafts."""
    k, prompt, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(8, 20))
    token = st.integers(0, 1)
    text = torch.tensor([data.draw(st.lists(token, min_size=length, max_size=length))])
    rows = st.lists(token, min_size=length - 1, max_size=length - 1)
    drafted = torch.tensor([[data.draw(rows)] for _ in range(3)])
    steps, accepted, at = 0, [0] * k, prompt  # `at`: the last token that is known
    while at + k < length:
        steps += 1
        drafts = [int(drafted[i, 0, at - 1]) for i in range(k)]
        follows = [int(text[0, at + 1 + i]) for i in range(k)]
        agreed = next((i for i in range(k) if drafts[i] != follows[i]), k)
        accepted = [count + (i < agreed) for i, count in enumerate(accepted)]
        at += agreed + 1
    assert serve_forward.walk(drafted, text, prompt, k) == [Drafts(steps, tuple(accepted))]


def test_acceptance_is_of_what_was_accepted_before() -> None:
    first, second = serve_forward.acceptance([Drafts(10, (5, 1)), Drafts(10, (5, 3))])
    assert (first.value, second.value) == (0.5, 0.4)
    assert first.low <= 0.5 <= first.high


def test_nothing_judged_is_nothing_wrong() -> None:
    unjudged, (judged,) = (
        serve_forward.Estimate(math.nan, math.nan, math.nan),
        serve_forward.acceptance([Drafts(10, (5,)), Drafts(12, (6,))] * 20),
    )
    assert serve_forward.inside(unjudged, judged) and serve_forward.inside(judged, unjudged)
    assert not serve_forward.inside(serve_forward.Estimate(0.9, 0.8, 1.0), judged)


@pytest.fixture(scope="module")
def artifact(rounded: Path) -> Checkpoint:
    return Checkpoint(rounded / "artifact", form="artifact")


def test_a_widened_tokenizer_names_every_token() -> None:
    vocabulary = 3000
    wide = serve_layers.widened(json.loads((serve_layers.TINY / "tokenizer.json").read_text()), vocabulary)
    numbers = {*wide["model"]["vocab"].values(), *(each["id"] for each in wide["added_tokens"])}
    assert numbers == set(range(vocabulary))


@pytest.mark.soak
def test_an_artifact_full_in_form_names_every_token(tmp_path: Path) -> None:
    """By the program that makes the large one."""
    made = Checkpoint(serve_layers.make(tmp_path, layers=1, device="cpu", small=True), form="artifact")
    assert load_tokenizer(made.directory).get_vocab_size() == made.config.vocab_size


@pytest.mark.slow
def test_our_forward_is_the_one_of_verify(artifact: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(artifact.config.vocab_size, (3, 24), generator=generator)
    written = text[:, 8:, None]
    ours = serve_forward.forward(artifact, text, written, CPU)
    (quality,) = evaluation.compare([artifact], text, CPU)
    assert torch.equal(ours.counts.judged, quality.judged) and torch.equal(ours.counts.accepted, quality.accepted)
    assert torch.allclose(-ours.asked[:, :, 0], quality.nll[:, 7:], atol=1e-2)
    assert bool((ours.best >= ours.asked[:, :, 0]).all())


def program(*arguments: object) -> int:
    with mock.patch.object(sys, "argv", ["serve", *map(str, arguments)]):
        return serve.main()


def arguments(artifact: Path, out: Path, *more: object) -> Sequence[object]:
    stand_in = f"{sys.executable} {STAND_IN}"
    sizes = ("--count", 2, "--prompt-tokens", 6, "--tokens", 12, "--streams", 1, "--rounds", 2, "--limit", 30)
    folders = ("--cache", out.parent / "cache", "--logs", out.parent / "logs")
    return ("--artifact", artifact, "--out", out, "--vllm", stand_in, "--device", "cpu", *sizes, *folders, *more)


@pytest.mark.slow
def test_the_program_reports_each_server(
    artifact: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "serve"
    load = ("--concurrency", 1, 3, "--load-tokens", 6, "--load-rounds", 2)
    code = program(*arguments(artifact.directory, out, "--drafts", 0, 2, *load))
    result = json.loads(out.with_name("serve.json").read_text())
    plain, drafting = result["servers"]
    assert plain["equal_to_plain"]["whole"] == drafting["equal_to_plain"]["whole"] == 2
    # the stand-in writes what nobody would, so that this has to be seen
    assert code == 1 and not result["within"] and drafting["agreement"]["same"]["value"] < 0.5
    assert drafting["counted"] == [[4, 4, 4], [4, 4, 4]]
    assert [row["server"]["value"] for row in drafting["acceptance"]] == [1.0, 1.0]
    assert drafting["medians"]["step_ms"] == pytest.approx(drafting["medians"]["token_ms"] * 11 / 4, rel=0.3)
    assert math.isfinite(drafting["medians"]["token_ms_ratio"]) and "token_ms_ratio" in plain["medians"]
    rows = [(row["concurrency"], row["requests"], row["drafts"], row["accepted"]) for row in drafting["loads"]]
    assert rows == [(1, 8, 16, [16, 16]), (3, 24, 48, [48, 48])] * 2  # six tokens: one, then two steps
    assert set(drafting["output_tok_s"]) == set(drafting["output_tok_s_ratio"]) == {"1", "3"}
    lines = [json.loads(line) for line in out.with_name("serve-1.jsonl").read_text().splitlines()]
    assert [len(line["prompt_token_ids"]) for line in lines] == [6, 6]
    assert [len(line["token_ids"]) for line in lines] == [12, 12]
    assert "NOT within" in capsys.readouterr().out

    like = out.with_name("serve-1.jsonl")
    program(*arguments(artifact.directory, tmp_path / "again", "--drafts", 2, "--like", like))
    (again,) = json.loads((tmp_path / "again.json").read_text())["servers"]
    assert again["equal_to_like"]["whole"] == 2


@pytest.mark.slow
def test_a_server_that_ends_leaves_its_log(artifact: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "serve"
    assert program(*arguments(artifact.directory, out, "--drafts", 0, 1, "--set", "max-num-seqs=0")) == 1
    for found in json.loads(out.with_name("serve.json").read_text())["servers"]:
        assert "code 3" in found["failure"] and "max-num-seqs" in found["log"][-1]
