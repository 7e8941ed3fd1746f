"""v4forge.bench.results: files that are continued by the same measurement, and by no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from v4forge.bench import results
from v4forge.bench.results import Measurement
from v4forge.errors import UserError

BENCHES = ("speed", "draft")

FACTS: dict[str, Any] = {
    "target": {"url": "http://127.0.0.1:8000", "model": "m", "artifact": {"sums_sha256": "a"}},
    "machine": {"gpus": ["NVIDIA H200"]},
    "versions": {"v4forge": "c0ffee", "vllm": "1"},
    "settings": {"concurrency": (1, 4)},
    "sampling": {"temperature": 0},
    "seed": 42,
    "hashes": {"prompts": "b"},
}


def begun(folder: Path, **more: Any) -> Measurement:
    return results.begin(folder, "draft", {**FACTS, **more}, command="python -m scripts.bench draft")


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second each time it is read."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(results, "now", lambda: f"2026-01-02T03:{(n := next(ticks)) // 60:02}:{n % 60:02}+00:00")


def test_a_file_is_named_by_its_bench_and_its_time_and_says_what_it_belongs_to(tmp_path: Path) -> None:
    found = begun(tmp_path)
    assert found.path.name == "draft-20260102T030000Z.json"
    kept = json.loads(found.path.read_text())
    assert {name: kept[name] for name in FACTS} == json.loads(json.dumps(FACTS))
    assert kept["complete"] is False and kept["parts"] == {} and kept["trial"] is None
    assert kept["commands"] == ["python -m scripts.bench draft"]


def test_an_interrupted_run_goes_on_with_what_it_had(tmp_path: Path) -> None:
    first = begun(tmp_path)
    first.keep("code", {"accepted": 3})
    first.fail("chat", UserError("the server is gone", "make serve"))
    again = begun(tmp_path)
    assert again.path == first.path and again.part("code") == {"accepted": 3}
    assert again.content["failures"] == {} and len(again.content["commands"]) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"target": {**FACTS["target"], "artifact": {"sums_sha256": "z"}}},
        {"machine": {"gpus": ["NVIDIA H100"]}},
        {"versions": {"v4forge": "c0ffee", "vllm": "2"}},
        {"settings": {"concurrency": (1,)}},
        {"sampling": {"temperature": 1}},
        {"seed": 43},
        {"hashes": {"prompts": "c"}},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_measurement_has_a_file_of_its_own(tmp_path: Path, other: dict[str, Any]) -> None:
    assert begun(tmp_path, **other).path != begun(tmp_path).path


def test_where_a_server_listens_and_which_commit_measures_make_no_other_measurement(tmp_path: Path) -> None:
    first = begun(tmp_path)
    moved = {**FACTS["target"], "url": "http://127.0.0.1:9000"}
    again = begun(tmp_path, target=moved, versions={"v4forge": "beef", "vllm": "1"})
    assert again.path == first.path and again.content["versions"]["v4forge"] == "c0ffee, beef"


def test_a_trial_is_not_continued_as_a_whole_run_nor_a_finished_one_at_all(tmp_path: Path) -> None:
    trial = results.begin(tmp_path, "draft", FACTS, trial=2)
    whole = begun(tmp_path)
    assert whole.path != trial.path
    assert whole.finish()
    assert begun(tmp_path).path != whole.path
    fresh = results.begin(tmp_path, "draft", FACTS, fresh=True)
    assert fresh.content["parts"] == {}


def test_a_run_with_a_failure_is_not_complete_until_that_part_is_measured(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.fail("code", UserError("500", "make serve-logs"))
    assert not run.finish()
    assert json.loads(run.path.read_text())["failures"] == {"code": {"fact": "500", "hint": "make serve-logs"}}
    run.keep("code", {})
    assert run.finish()


def test_parts_are_measured_once_and_a_failing_one_does_not_stop_the_others(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.keep("a", {"n": 1})
    asked = []

    def one(key: str) -> dict[str, int]:
        asked.append(key)
        if key == "b":
            raise UserError("HTTP 500", "make serve-logs")
        return {"n": 2}

    results.measured(run, ["a", "b", "c"], one)
    assert asked == ["b", "c"] and run.content["failures"].keys() == {"b"}
    part = run.part("c")
    assert part and part["n"] == 2 and part["started"] < part["ended"]


def test_when_nothing_answers_any_more_the_bench_ends(tmp_path: Path) -> None:
    run = begun(tmp_path)

    def one(key: str) -> dict[str, int]:
        raise UserError(f"no answer to {key}", "make serve")

    with pytest.raises(UserError, match="no answer to c"):
        results.measured(run, list("abcdef"), one)
    assert list(run.content["failures"]) == ["a", "b", "c"]


def test_the_newest_whole_measurement_goes_before_unfinished_ones_and_trials(tmp_path: Path) -> None:
    whole = begun(tmp_path)
    whole.keep("code", {})
    whole.finish()
    begun(tmp_path).keep("code", {})
    results.begin(tmp_path, "draft", FACTS, trial=1).finish()
    results.begin(tmp_path, "draft", FACTS, fresh=True).finish()
    assert results.newest(tmp_path, BENCHES)["draft"].content["started"] == whole.content["started"]
    assert results.newest(tmp_path, BENCHES).keys() == {"draft"} and results.newest(tmp_path / "none", BENCHES) == {}


def test_what_was_measured_and_cannot_be_read_is_not_passed_over(tmp_path: Path) -> None:
    begun(tmp_path).finish()
    (tmp_path / "draft-20270101T000000Z.json").write_text("{torn")
    with pytest.raises(UserError, match=r"draft-20270101T000000Z\.json is not JSON"):
        results.newest(tmp_path, BENCHES)
    assert begun(tmp_path).content["parts"] == {}, "it is no measurement to go on with either"
