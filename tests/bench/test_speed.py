"""bench.speed and bench.vllm_bench without a server: which points there are, what is read from results of
`vllm bench serve` (tests/data/bench-serve.json, of a real one), what is concluded from them."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import run_here

from scripts import bench_speed, benching
from scripts.bench import parse
from v4forge.bench import comparison, measure_speed, speed, vllm_bench, workloads
from v4forge.bench.speed import Comparison, Point
from v4forge.bench.vllm_bench import Client, Load
from v4forge.errors import UserError
from v4forge.images import containers
from v4forge.intervals import Estimate

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models/tiny"
WORDS = workloads.vocabulary(TINY)
RESULT = json.loads((ROOT / "tests/data/bench-serve.json").read_text())
MEASURED = Point(2, 32, 16, 2)
SLO_MS = {"ttft": 80.0, "tpot": 20.0}  # as it was asked
SHAPES = [(32, 16), (64, 16)]


def figures(result: dict[str, Any] = RESULT) -> dict[str, Any]:
    return speed.figures(result, MEASURED, len(RESULT["ttfts"]), SLO_MS)


def test_a_server_is_measured_point_by_point_and_its_first_point_once_more() -> None:
    points = speed.points(2, SHAPES, [1, 4])
    assert [point.key for point in points] == [
        "k2/32x16/c1",
        "k2/32x16/c4",
        "k2/64x16/c1",
        "k2/64x16/c4",
        "k2/32x16/c1/again",
    ]


def test_the_client_reads_the_prompts_from_the_file_as_they_are(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")  # what `vllm bench serve` reads it with
    prompts = workloads.random_prompts(WORDS, 64, 40, "seed")
    (tmp_path / "prompts.jsonl").write_text(vllm_bench.lines(prompts))
    assert pandas.read_json(tmp_path / "prompts.jsonl", lines=True)["prompt"].tolist() == prompts


def test_servers_get_the_same_prompts_and_no_two_points_of_one_share_any(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    with_drafts, without = bench.options.points(2), bench.options.points(0)
    assert [bench.prompts(point) for point in with_drafts] == [bench.prompts(point) for point in without]
    every = [text for point in without for warm_up in (False, True) for text in bench.prompts(point, warm_up=warm_up)]
    assert len(set(every)) == len(every) == (8 + 1) * (1 + 4 + 1 + 4 + 1)


def bench_of(folder: Path) -> measure_speed.Bench:
    words = ["speed", "--concurrency", "1", "4", "--shapes", "32x16", "64x16", "--reports", str(folder)]
    given = parse(words)
    return measure_speed.Bench(
        benching.session_of(given), bench_speed.options_of(given), Client("/nowhere"), TINY, WORDS
    )


def test_the_numbers_of_drafts_are_compared_and_the_key_leaves_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "sesame")
    given = parse(["speed", "--drafts", "2", "0", "2"])
    session = benching.session_of(given)
    assert bench_speed.drafts_of(given) == [0, 2] and session.wanted.drafts is None
    assert [measure_speed.with_drafts(session, k).drafts for k in (0, 2)] == [0, 2]
    assert session.key == "sesame" and "API_KEY" not in os.environ


def test_the_figures_are_those_that_the_client_itself_computes() -> None:
    found = figures()
    for name in ("ttft", "tpot", "e2el"):
        for figure in ("median", "mean", "p99"):
            assert found[f"{name}_ms"][figure] == pytest.approx(RESULT[f"{figure}_{name}_ms"])
    assert found["output_tok_s"] == pytest.approx(RESULT["output_throughput"])
    assert found["goodput_request_s"] == pytest.approx(RESULT["request_goodput"]) and found["goodput_request_s"] > 0
    assert found["goodput_request_s"] < found["request_s"], "the objectives are such that a request misses them"
    assert [len(values) for values in found["samples"].values()] == [len(RESULT["ttfts"])] * 3


def test_time_per_token_counts_tokens_and_not_chunks() -> None:
    result = copy.deepcopy(RESULT)
    chunks = [len(gaps) + 1 for gaps in result["itls"]]
    assert min(chunks) < MEASURED.output_tokens, "with drafts some tokens came together"
    tpot = np.median([sum(gaps) / (MEASURED.output_tokens - 1) for gaps in result["itls"]]) * 1e3
    assert figures()["tpot_ms"]["median"] == pytest.approx(tpot, rel=1e-3)


def test_a_stream_that_is_held_back_is_seen() -> None:
    result = copy.deepcopy(RESULT)
    assert figures()["bursts"] < 0.5
    result["itls"] = [[1e-5] * 8 + [0.2] + [1e-5] * 3 for _ in result["itls"]]
    assert figures(result)["bursts"] == pytest.approx(11 / 12)


def broken(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda result: result.update(changes)


def ended_early(result: dict[str, Any]) -> None:
    result["output_lens"][3] = 7


def read_otherwise(result: dict[str, Any]) -> None:
    result["input_lens"][0] = 48


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (
            broken(completed=14, failed=2, errors=["", "Traceback …\nClientPayloadError: it broke off\n", "b"]),
            "2 of 16 requests failed, the first with: ClientPayloadError: it broke off",
        ),
        (ended_early, "1 of 16 answers have not 16 tokens, the first has 7"),
        (read_otherwise, "the server read 48 tokens in a prompt of 32"),
        (lambda result: result.pop("latencies"), "the result of vllm bench serve has another form: KeyError"),
        (broken(duration=None), "the result of vllm bench serve has another form: TypeError"),
        (broken(ttfts=["soon"] * 16), "the result of vllm bench serve has another form"),
    ],
)
def test_anything_but_whole_answers_to_all_requests_is_no_figure(change: Callable[..., object], fact: str) -> None:
    result = copy.deepcopy(RESULT)
    change(result)
    with pytest.raises(UserError, match=re.escape(fact)):
        figures(result)


def part(drafts: int, concurrency: int, tpot_ms: float, noise: np.ndarray, again: bool = False) -> dict[str, Any]:
    """A point whose groups of `concurrency` requests take tpot_ms a token times 1 + their noise, [groups]."""
    tokens = 256
    tpots = np.repeat(tpot_ms * (1 + noise), concurrency)
    whole = 20.0 + tpots * (tokens - 1)
    duration_s = float(whole.sum()) / 1e3 / concurrency
    return {
        "drafts": drafts,
        "input_tokens": 256,
        "output_tokens": tokens,
        "concurrency": concurrency,
        "again": again,
        "requests": len(tpots),
        "duration_s": duration_s,
        "tpot_ms": {"median": float(np.median(tpots))},
        "output_tok_s": len(tpots) * tokens / duration_s,
        "samples": {"tpot_ms": tpots.tolist(), "e2el_ms": whole.tolist()},
    }


def parts_of(tpots_ms: dict[tuple[int, int], float], spread: float = 0.01, seed: int = 1) -> dict[str, Any]:
    """(drafts, concurrency) -> ms a token, as measured parts of eight groups."""
    source = np.random.default_rng(seed)
    return {
        Point(k, 256, 256, c).key: part(k, c, tpot_ms, source.normal(0, spread, 8))
        for (k, c), tpot_ms in tpots_ms.items()
    }


# As published for batches of 1, 4 and 16: better times per token at one request, lower throughput at many.
PARTS = parts_of({(0, 1): 9.0, (0, 4): 16.0, (0, 16): 17.0, (1, 1): 6.0, (1, 4): 16.1, (1, 16): 25.0})


def test_both_the_speed_up_and_the_ratio_are_told_and_are_those_of_the_figures() -> None:
    one = speed.compare(PARTS, 1)[0]
    assert (one.drafts, one.shape, one.concurrency) == (1, "256x256", 1)
    assert one.tpot_speedup.value == pytest.approx(1.5, rel=0.02)
    without, with_drafts = PARTS["k0/256x256/c1"], PARTS["k1/256x256/c1"]
    assert one.throughput_ratio.value == with_drafts["output_tok_s"] / without["output_tok_s"]
    for ratio in (one.tpot_speedup, one.throughput_ratio):
        assert ratio.low < ratio.value < ratio.high < 1.1 * ratio.low


def test_drafts_pay_where_throughput_is_above_that_without_beyond_noise() -> None:
    assert [each.pays for each in speed.compare(PARTS, 1)] == [speed.YES, speed.UNCLEAR, speed.NO]
    (stop,) = speed.stops(speed.compare(PARTS, 1))
    assert (stop.pays, stop.at) == ([1], 4)
    assert stop.sentence().startswith("k=1, 256x256: pays at concurrency 1, stops paying at 4 (")


def test_the_same_seed_gives_the_same_intervals() -> None:
    assert speed.summary(PARTS, 1) == speed.summary(PARTS, 1) != speed.summary(PARTS, 2)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_intervals_hold_the_truth_in_95_percent_of_draws(concurrency: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that run together share their noise, eight times over."""
    monkeypatch.setattr(speed, "DRAWS", 1000)
    held, draws = np.zeros(2), 400
    for seed in range(draws):
        (one,) = speed.compare(parts_of({(0, concurrency): 9.0, (2, concurrency): 6.0}, 0.05, seed), seed)
        truths = 9.0 / 6.0, (20 + 255 * 9.0) / (20 + 255 * 6.0)
        held += [r.low <= t <= r.high for r, t in zip((one.tpot_speedup, one.throughput_ratio), truths, strict=True)]
    assert (abs(held / draws - 0.95) < 0.04).all(), held / draws


def test_what_a_server_drifts_is_noise_too() -> None:
    again = part(0, 1, 15.0, np.zeros(8), again=True)
    drifted = PARTS | {"k0/256x256/c1/again": again}
    assert speed.drift_of(PARTS, 0) is None
    found = speed.drift_of(drifted, 0)
    assert found and found["tpot"] == pytest.approx(15 / 9 - 1, rel=0.02) and found["throughput"] < -0.3
    compared = speed.compare(drifted, 1)
    assert compared[0].pays == speed.UNCLEAR and speed.compare(PARTS, 1)[0].pays == speed.YES
    slower, faster = again["output_tok_s"], PARTS["k0/256x256/c1"]["output_tok_s"]
    assert compared[0].throughput_drift == pytest.approx(faster / slower - 1)


def test_without_a_server_without_drafts_nothing_is_compared() -> None:
    only = {key: each for key, each in PARTS.items() if each["drafts"]}
    assert speed.compare(only, 1) == [] == speed.summary(only, 1)["stops_paying"]


def test_one_group_of_requests_says_nothing_beyond_noise() -> None:
    short = {key: part(k, 4, tpot_ms, np.zeros(1)) for key, k, tpot_ms in
             [("k0/256x256/c4", 0, 9.0), ("k1/256x256/c4", 1, 3.0)]}  # fmt: skip
    (one,) = speed.compare(short, 1)
    assert one.tpot_speedup.value == pytest.approx(3) and math.isnan(one.tpot_speedup.low)
    assert one.pays == one.faster == speed.UNCLEAR and one.json()["tpot_speedup"]["low"] is None


def compared(ratio: float, concurrency: int) -> Comparison:
    estimate = Estimate(ratio, ratio - 0.02, ratio + 0.02)
    return Comparison(3, "256x256", concurrency, Estimate(1.5, 1.4, 1.6), estimate, 0.0, 0.0)


@pytest.mark.parametrize(
    ("ratios", "at", "sentence"),
    [
        ([1.5, 1.3, 1.1], None, "pays up to concurrency 16, the most that was measured"),
        (
            [1.5, 1.3, 1.01],
            16,
            "pays at concurrency 1 and 4, stops paying at 16 "
            "(1.01 x the throughput, 0.99 to 1.03: no gain beyond noise)",
        ),
        ([1.5, 0.9, 1.2], None, "pays up to concurrency 16, the most that was measured; at 4 it does not"),
        ([0.9, 0.8, 0.7], 1, "pays at none of 1, 4 and 16 (0.90 x the throughput, 0.88 to 0.92 at 1)"),
    ],
)
def test_it_is_said_from_which_concurrency_on_drafts_do_not_pay(
    ratios: list[float], at: int | None, sentence: str
) -> None:
    (stop,) = speed.stops(map(compared, ratios, [1, 4, 16]))
    assert stop.at == at and stop.sentence() == f"k=3, 256x256: {sentence}"


LOAD = Load("http://127.0.0.1:8000", "flash", ["a", "b"], 16, 2, SLO_MS, 42)
KEY = "a-secret-key"


def test_the_key_is_on_no_command_line(tmp_path: Path) -> None:
    words = Client("/opt/bin").words(LOAD.command(TINY, tmp_path), tmp_path, [TINY], KEY)
    assert not any(KEY in word for word in words.command) and words.variables["OPENAI_API_KEY"] == KEY


def test_neither_a_proxy_nor_a_key_of_the_callers_reaches_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another service")
    variables = Client("/opt/bin").words(LOAD.command(TINY, tmp_path), tmp_path, [TINY], "").variables
    assert "OPENAI_API_KEY" not in variables and variables["NO_PROXY"] == variables["no_proxy"] == "*"


def test_in_the_image_the_client_is_on_the_hosts_network_and_its_key_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "connect", lambda: containers.Engine(None, frozenset()))
    words = Client(image="serve:1").words(LOAD.command(TINY, tmp_path), tmp_path, [TINY], KEY)
    assert words.command[:3] == ["docker", "run", "--rm"] and words.command[-1] == "tpot:20"
    assert {"--network=host", "--entrypoint=vllm", "--env=OPENAI_API_KEY", f"--name={words.container}"} <= set(
        words.command
    )
    assert f"--mount=type=bind,source={TINY},target={TINY},readonly" in words.command
    assert words.command[words.command.index("serve:1") + 1 :][:2] == ["bench", "serve"]
    assert not any(KEY in word for word in words.command) and words.variables["OPENAI_API_KEY"] == KEY


def bench(*words: object) -> int:
    return run_here("bench", "speed", "--backend", "cpu", "--artifact", TINY, *words)


@pytest.mark.parametrize(
    ("words", "fact", "hint"),
    [
        (["--requests-per-concurrency", "4"], "4 requests for each at a time are too few", "--limit 4"),
        (["--url", "http://127.0.0.1:1", "--drafts", "1"], "--drafts says which servers to start", "leave one"),
        (["--shapes", "2048x256"], "2048x256 are 2304 tokens, and max-model-len is 2048", "max-model-len=2304"),
        (["--concurrency", "0"], "a concurrency is at least 1", "--help"),
        (["--limit", "0"], "--limit 0 leaves nothing to measure", "--limit 2"),
        (["--program", "/nowhere"], "there is no vllm in /nowhere", "--program"),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_server_starts(
    words: list[str], fact: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(*words, "--reports", tmp_path) == 1
    said = capsys.readouterr().err.splitlines()
    assert fact in said[-2] and hint in said[-1]


@pytest.mark.parametrize("text", ["256", "0x16", "32x1", "32x-1", "axb"])
def test_a_shape_is_tokens_of_a_prompt_and_of_an_answer(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--shapes", text) == 2
    assert "is not tokens of a prompt x tokens of an answer" in capsys.readouterr().err


def test_a_dry_run_counts_servers_requests_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--dry-run", "--reports", tmp_path / "none") == 0
    said = capsys.readouterr().out
    assert "256x256/c16                128 requests, 16 before them to warm up" in said
    requests = 2 * 8 * (1 + 4 + 16) + 8
    tokens = 8 * (1 + 4 + 16) * (256 + 1024) + 8 * 256
    assert said.startswith("a server each with k = 0, 1, 2 and 3")
    assert f"{4 * requests:,} requests, {4 * tokens:,} tokens of answers" in said
    assert not (tmp_path / "none").exists()


def test_the_table_has_a_row_a_point_and_fits_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {}
    for k in (0, 2):
        for point in speed.points(k, [(32, 16)], [2, 16]):
            found = speed.figures(RESULT, MEASURED, 16, SLO_MS)
            parts[point.key] = found | {"drafts": k, "concurrency": point.concurrency, "again": point.again}
            parts[point.key]["acceptance"] = 0.5 if k else None
    content = {"parts": parts, "summary": speed.summary(parts, 1), "settings": {"slo_ms": SLO_MS}}
    bench_speed.show(content)
    said = capsys.readouterr().out
    assert len(re.findall(r"^32x16 +(2|16) +(0|2) ", said, re.MULTILINE)) == 4 and "…" not in said
    assert max(map(len, said.splitlines())) <= 120


def test_requests_at_a_rate_are_further_points_with_prompts_and_options_of_their_own(tmp_path: Path) -> None:
    words = ["speed", "--concurrency", "1", "4", "--shapes", "32x16", "--request-rate", "2", "0.5", "2"]
    options = bench_speed.options_of(parse([*words, "--reports", str(tmp_path)]))
    points = options.points(1)
    assert [point.key for point in points] == [
        *("k1/32x16/c1", "k1/32x16/c4", "k1/32x16/r0.5", "k1/32x16/r2", "k1/32x16/c1/again"),
    ]
    bench = measure_speed.Bench(benching.session_of(parse(words)), options, Client("/nowhere"), TINY, WORDS)
    assert [len(bench.prompts(point)) for point in points] == [8, 32, 32, 32, 8]
    load = Load("http://127.0.0.1:1", "m", ["a"], 16, None, SLO_MS, 1, rate=0.5).command(TINY, tmp_path)
    assert load[load.index("--request-rate") + 1] == "0.5" and "--max-concurrency" not in load
    assert "--request-rate" not in LOAD.command(TINY, tmp_path)


def test_points_at_a_rate_are_shown_and_compared_between_runs_but_not_with_k0() -> None:
    at_rate = Point(2, 32, 16, None, request_rate=4.0)
    found = speed.figures(RESULT, at_rate, 16, SLO_MS) | {"acceptance": 0.5}
    parts = {at_rate.key: found, Point(0, 32, 16, None, request_rate=4.0).key: found | {"drafts": 0}}
    assert speed.compare(parts, 1) == [] and speed.summary(parts, 1)["stops_paying"] == []
    assert speed.in_flight(found) == max(1, round(sum(found["samples"]["e2el_ms"]) / 1e3 / found["duration_s"]))
    content = {"parts": parts, "summary": speed.summary(parts, 1)}
    assert [list(column.cells) for column in bench_speed.table(content).columns][1] == ["4/s", "4/s"]
    (tpot, *_) = comparison._speed({"hashes": {}, "parts": parts}, {"hashes": {}, "parts": parts}, list(parts)[:1])
    assert tpot.metric == "k2/32x16/r4: TPOT, ms" and tpot.change == 0 and tpot.p == 1


@pytest.mark.parametrize("rate", ["0", "-1", "inf", "nan"])
def test_a_rate_that_is_none_is_said_before_a_server_starts(
    rate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--request-rate", rate, "--reports", tmp_path) == 1
    assert "a request rate is above 0" in capsys.readouterr().err


def test_itl_is_kept_with_a_point() -> None:
    gaps = [gap * 1e3 for each in RESULT["itls"] for gap in each]
    assert figures()["itl_ms"]["median"] == pytest.approx(np.median(gaps))
