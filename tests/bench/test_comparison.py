"""v4forge.bench.comparison and scripts.compare, on made-up result files."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import bench_results as made
import pytest

from scripts import compare as program
from v4forge.bench import comparison
from v4forge.bench.comparison import Comparison, compare
from v4forge.bench.results import Result
from v4forge.errors import UserError


def result(content: dict[str, Any], name: str = "a") -> dict[str, Result]:
    return {content["bench"]: Result(Path(name), content)}


def compared(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    (found,) = compare(result(a), result(b, "b"))
    return found


@pytest.mark.parametrize("bench", made.BENCHES)
def test_a_run_does_not_differ_from_itself(bench: str) -> None:
    found = compared(made.BENCHES[bench](), made.BENCHES[bench]())
    assert found.settings == [] and found.deltas
    for delta in found.deltas:
        assert delta.change == 0 and delta.p == 1 and not delta.beyond_noise


@pytest.mark.parametrize(
    ("bench", "worse"),
    [("speed", {"slower": 1.2}), ("draft", {"worse": 0.05}), ("quality", {"better": -0.05}), ("tools", {"lost": 12})],
)
def test_what_is_much_worse_is_beyond_noise_and_called_worse(bench: str, worse: dict[str, Any]) -> None:
    found = compared(made.BENCHES[bench](), made.BENCHES[bench](**worse))
    beyond = [delta for delta in found.deltas if delta.beyond_noise]
    assert beyond and not any(delta.better for delta in beyond)
    for delta in found.deltas:
        assert delta.low is not None and delta.change is not None and delta.high is not None
        assert delta.low <= delta.change <= delta.high


def test_runs_that_differ_by_chance_are_rarely_called_different() -> None:
    named = 0
    for seed in range(20):
        found = compare(result(made.draft(seed=seed)), result(made.draft(seed=100 + seed), "b"))
        named += any(delta.beyond_noise for delta in found[0].deltas)
    assert named <= 4, "at 5% four or fewer of twenty come in 99.7% of cases"


def test_acceptance_has_the_error_between_prompts_and_not_between_tokens() -> None:
    a, b = made.draft(seed=1), made.draft(seed=2)
    b["hashes"] = {"other": "1"}  # other prompts under another name, so not paired
    delta = next(each for each in compared(a, b).deltas if each.metric == "code: position 1")
    rates = [[row[1] / row[0] for row in each["parts"]["code"]["counted"]] for each in (a, b)]
    error = math.sqrt(sum(statistics.variance(each) / len(each) for each in rates))
    assert delta.change == pytest.approx(100 * (statistics.fmean(rates[1]) - statistics.fmean(rates[0])), abs=0.3)
    assert delta.high is not None and delta.low is not None
    assert (delta.high - delta.low) / 2 == pytest.approx(100 * 2.01 * error, rel=0.1)


def test_other_questions_are_not_compared() -> None:
    a, b = made.draft(), made.draft(seed=1)
    b["hashes"]["prompts"] = "7" * 64
    found = compared(a, b)
    assert found.warnings[0] == "not comparable: prompts differ"
    assert all(delta.p is None and delta.change is None for delta in found.deltas)


def test_a_workload_with_other_prompts_is_not_compared_and_the_others_are() -> None:
    a, b = made.draft(), made.draft(worse=0.1)
    a["hashes"], b["hashes"] = {"random": "1", "code": "2"}, {"random": "3", "code": "2"}
    deltas = compared(a, b).deltas
    assert {delta.metric for delta in deltas if delta.p is None} == {
        f"random tokens: {name}"
        for name in ("acceptance rate", "position 1", "position 2 after 1", "position 3 after 2")
    }


def test_other_sampling_is_not_compared() -> None:
    a, b = made.tools(), made.tools(lost=10)
    b["sampling"]["temperature"] = 1
    found = compared(a, b)
    assert found.warnings[0] == "not comparable: sampling.temperature is 0 and 1"
    assert all(delta.p is None for delta in found.deltas)


def test_a_task_with_other_prompts_is_not_compared_and_the_others_are() -> None:
    a, b = made.quality(), made.quality(better=0.1)
    b["parts"]["mmlu"]["task_hash"] = "1" * 64
    found = {delta.metric: delta for delta in compared(a, b).deltas}
    assert found["mmlu: accuracy"].p is None and found["mmlu: accuracy"].note == "not comparable: other prompts"
    assert found["mmlu_pro: exact_match"].beyond_noise


def test_what_differs_in_settings_and_machine_is_said() -> None:
    a, b = made.speed(), made.speed()
    b["machine"]["gpus"], b["versions"]["vllm"] = ["NVIDIA H100"], "0.y"
    b["target"]["url"] = "http://127.0.0.1:9000"
    found = compared(a, b)
    assert [each[0] for each in found.settings] == ["machine.gpus", "versions.vllm"]
    assert any(warning.startswith("other machines") for warning in found.warnings)
    assert "B: on 1 x NVIDIA H100, where nothing was published: not comparable" in found.warnings


def test_a_trial_and_an_unfinished_run_are_warned_of() -> None:
    a, b = made.tools(trial=3), made.tools()
    b["complete"] = False
    warnings = compared(a, b).warnings
    assert "A: a trial of 3: not a result" in warnings and "B is unfinished" in warnings


def test_what_a_server_drifts_by_itself_is_noise() -> None:
    a, b = made.speed(), made.speed(slower=1.1)
    again = b["parts"]["k1/256x256/c1/again"]
    again["tpot_ms"]["median"] *= 1.5
    deltas = {delta.metric: delta for delta in compared(a, b).deltas}
    assert not deltas["k1/256x256/c16: TPOT, ms"].beyond_noise
    assert deltas["k2/256x256/c16: TPOT, ms"].beyond_noise


def test_speed_with_one_request_each_has_no_noise_to_compare_with() -> None:
    a, b = made.speed(), made.speed(slower=2)
    for each in (a, b):
        for part in each["parts"].values():
            part["requests"] = part["concurrency"]
    found = compared(a, b)
    assert all(delta.p is None and not delta.beyond_noise for delta in found.deltas)


def test_different_benches_are_refused() -> None:
    with pytest.raises(UserError, match="A has speed, B has draft: nothing to compare"):
        compare(result(made.speed()), result(made.draft()))


def test_runs_without_a_part_in_common_are_refused() -> None:
    a, b = made.draft(), made.draft()
    a["parts"] = {"code": a["parts"]["code"]}
    del b["parts"]["code"]
    with pytest.raises(UserError, match="no part in common"):
        compare(result(a), result(b))


def test_the_program_takes_folders_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.write(tmp_path / "a/reports", *made.full())
    made.write(tmp_path / "b", made.quality(better=-0.05), made.tools())
    assert program.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "worse: mmlu: accuracy -5.00" in out and "beyond noise: 4 of 8 tested figures" in out
    file = tmp_path / "b" / f"quality-{made.STAMP}.json"
    assert program.main([str(tmp_path / "a/reports"), str(file), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["bench"] == "quality" and len(found["deltas"]) == 6
    assert [delta["better"] for delta in found["deltas"] if delta["beyond_noise"]] == [False] * 4


@pytest.mark.parametrize(
    ("name", "content", "fact"),
    [
        ("missing", None, "missing does not exist"),
        ("speed-20261126T010203Z.json", "{", "is not JSON"),
        ("other.json", "{}", "is not the result of a bench"),
        ("draft-20261126T010203Z.json", json.dumps({**made.draft(), "parts": {"code": {}}}), "has no 'counted'"),
        ("tools-20261126T010203Z.json", json.dumps({**made.tools(), "parts": {"a/b": {"score": "x"}}}), "another form"),
    ],
)
def test_what_cannot_be_compared_is_named_with_a_hint(
    tmp_path: Path, name: str, content: str | None, fact: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    (good,) = made.write(tmp_path / "good", made.BENCHES[name.split("-")[0] if "-" in name else "tools"]())
    for paths in ((path, good), (good, path)):
        with pytest.raises(UserError, match=re.escape(fact)) as raised:
            program.main([str(each) for each in paths])
        assert raised.value.hint and str(path) in raised.value.fact


def test_a_comparison_begins_with_its_verdict_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.write(tmp_path / "a", made.quality(), made.tools())
    made.write(tmp_path / "same", made.quality(), made.tools())
    made.write(tmp_path / "worse", made.quality(better=-0.05), made.tools())
    made.write(tmp_path / "both", made.quality(better=0.05), made.tools(lost=14))
    for name, said in (
        ("same", "no difference between A and B beyond noise, in 8 tested figures"),
        ("worse", "of 8 tested figures B is beyond noise worse in 4 (quality 4)"),
        (
            "both",
            "of 8 tested figures B is beyond noise better in 4 (quality 4) and worse in 1 (tools 1)",
        ),
    ):
        program.main([str(tmp_path / "a"), str(tmp_path / name)])
        assert capsys.readouterr().out.splitlines()[0].startswith(f"verdict: {said}")
    one = made.tools()
    one["parts"] = {"selection/s0": one["parts"]["selection/s0"]}
    found = compare(result(one), result(one, "b"))
    assert comparison.verdict(found, "the baseline", "ours").startswith("not known: no figure of the baseline and ours")


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no result of a bench"):
        program.main([str(tmp_path), str(tmp_path)])


def test_draws_are_enough_for_the_figures_to_be_the_same_every_time() -> None:
    assert compared(made.speed(), made.speed(seed=1)) == compared(made.speed(), made.speed(seed=1))
    assert comparison.DRAWS >= 1000
