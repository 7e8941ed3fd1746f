"""v4forge.serving.metrics on what vLLM's /metrics says, and on what is not that."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from v4forge.checkout import ROOT
from v4forge.errors import UserError
from v4forge.serving import metrics
from v4forge.serving.metrics import COUNTERS, Counts, Reading

EMPTY = Counts()


def exported(engines: int = 1, drafts: int | None = 10, depth: int = 2) -> str:
    """What the library itself writes for vLLM's names, each engine with the same values."""
    registry = CollectorRegistry()
    labels = ["model_name", "engine"]
    rows = {"vllm:generation_tokens": 100.0, "vllm:prompt_tokens": 7.0}
    if drafts is not None:
        rows |= {
            "vllm:spec_decode_num_drafts": drafts,
            "vllm:spec_decode_num_draft_tokens": drafts * depth,
            "vllm:spec_decode_num_accepted_tokens": drafts,
        }
    for name, value in rows.items():
        counter = Counter(name, name, labels, registry=registry)
        for engine in range(engines):
            counter.labels("flash", str(engine)).inc(value)
    if drafts is not None:
        per_position = Counter(metrics.ACCEPTED_AT, "by position", [*labels, "position"], registry=registry)
        for engine in range(engines):
            for position in reversed(range(depth)):
                per_position.labels("flash", str(engine), str(position)).inc(drafts / 2)
    for name, value in (("num_requests_running", 3), ("num_requests_waiting", 0), ("kv_cache_usage_perc", 0.25)):
        gauge = Gauge(f"vllm:{name}", name, labels, registry=registry)
        for engine in range(engines):
            gauge.labels("flash", str(engine)).set(value)
    Gauge("process_start_time_seconds", "start", registry=registry).set(1000.0)
    return generate_latest(registry).decode()


def test_a_server_with_drafts_is_read() -> None:
    reading = metrics.read(exported(), 1060.0)
    assert (reading.model, reading.running, reading.waiting, reading.kv_usage) == ("flash", 3, 0, 0.25)
    assert reading.uptime_s == 60
    assert reading.counts == Counts(7, 100, 10, 20, 10, (5, 5))
    assert reading.counts.acceptance == 0.5 and reading.counts.acceptance_at == (0.5, 0.5)


def test_engines_of_one_server_are_added_and_the_fullest_cache_counts() -> None:
    reading = metrics.read(exported(engines=3), 1060.0)
    assert reading.counts == Counts(21, 300, 30, 60, 30, (15, 15))
    assert (reading.running, reading.kv_usage, reading.started_s) == (9, 0.25, 1000)


def test_what_is_not_exported_is_none_and_not_zero() -> None:
    reading = metrics.read(exported(drafts=None), 1.0)
    assert reading.counts == Counts(7, 100)
    assert reading.counts.acceptance is None and reading.counts.acceptance_at is None
    assert metrics.read("", 1.0) == Reading(1.0)
    assert Reading(1.0).uptime_s is None


def test_no_drafts_yet_have_no_acceptance() -> None:
    counts = metrics.read(exported(drafts=0), 1.0).counts
    assert counts.drafts == 0 and counts.acceptance is None and counts.acceptance_at is None


@pytest.mark.parametrize("typed", ["# TYPE {} counter\n", ""])
@pytest.mark.parametrize("suffix", ["", "_total"])
def test_counters_are_read_with_and_without_total(suffix: str, typed: str) -> None:
    name = f"vllm:generation_tokens{suffix}"
    assert metrics.read(f'{typed.format(name)}{name}{{engine="0"}} 5\n', 0).counts.generated == 5


def test_the_time_of_a_counters_creation_is_not_its_value() -> None:
    text = "# TYPE vllm:generation_tokens_created gauge\nvllm:generation_tokens_created 1.7e9\n"
    assert metrics.read(text, 0).counts == EMPTY


def test_the_older_name_of_the_cache_usage_is_known() -> None:
    assert metrics.read("vllm:gpu_cache_usage_perc 0.5\n", 0).kv_usage == 0.5


@pytest.mark.parametrize("text", ["<html>", '{"error": "x"}', "not metrics", "a{b=", f"{metrics.ACCEPTED_AT} 1\n"])
def test_what_is_not_metrics_is_an_error_with_its_text(text: str) -> None:
    with pytest.raises(UserError, match="not in Prometheus' text format"):
        metrics.read(text, 0)


@given(st.text(alphabet=st.sampled_from('vllm:_total{}="# TYPE counter 1.e9\n\\'), max_size=80))
def test_no_text_is_a_traceback(text: str) -> None:
    with suppress(UserError):
        metrics.read(text, 0)


finite = st.floats(0, 1e9, allow_nan=False)
some_counts = st.builds(
    Counts,
    **dict.fromkeys(COUNTERS, st.none() | finite),
    accepted_at=st.none() | st.lists(finite, max_size=3).map(tuple),
)


@given(some_counts)
def test_nothing_was_added_since_now_and_all_of_it_after_a_restart(counts: Counts) -> None:
    nothing = counts.since(counts)
    assert all(getattr(nothing, name) in (0, None) for name in COUNTERS)
    larger = Counts(**dict.fromkeys(COUNTERS, 2e9), accepted_at=(2e9,) * 3)
    assert counts.since(larger) == counts


@given(st.lists(some_counts, max_size=4))
def test_a_total_is_the_sum_of_those_that_count(every: list[Counts]) -> None:
    total = metrics.total(every)
    for name in COUNTERS:
        known = [value for each in every if (value := getattr(each, name)) is not None]
        assert getattr(total, name) == (sum(known) if known else None)


def test_replicas_of_different_depth_add_by_position() -> None:
    assert metrics.total([Counts(accepted_at=(4, 2)), Counts(accepted_at=(1,)), EMPTY]).accepted_at == (5, 2)


def test_a_difference_has_its_own_acceptance() -> None:
    earlier, later = Counts(drafts=10, draft_tokens=20, accepted=2), Counts(drafts=30, draft_tokens=60, accepted=32)
    assert later.since(earlier).acceptance == 0.75


def test_tokens_a_second_need_two_readings_of_a_server_that_counts() -> None:
    earlier, later = (Reading(at, started_s=1.0, counts=Counts(generated=n)) for at, n in ((10.0, 100), (14.0, 300)))
    assert later.tokens_per_s(earlier) == 50
    assert later.tokens_per_s(later) is None and later.tokens_per_s(Reading(10.0)) is None
    assert later.tokens_per_s(Reading(10.0, counts=Counts(generated=1e6))) == 75  # began anew
    assert not later.restarted(earlier) and later.restarted(Reading(10.0, started_s=0.5))


def test_a_value_that_is_no_number_stays_one() -> None:
    assert math.isnan(metrics.read("vllm:kv_cache_usage_perc NaN\n", 0).kv_usage or 0.0)


def test_the_metrics_of_a_real_server_are_read() -> None:
    """data/metrics-vllm.txt: vLLM 0.32 on a CPU with models/tiny's artifact at k = 1, what this module reads of it."""
    reading = metrics.read(((ROOT / "tests/data") / "metrics-vllm.txt").read_text(), 1795643200.0)
    assert reading.model == "deepseek-v4-flash-w4a16"
    assert (reading.running, reading.waiting, reading.kv_usage) == (0, 0, 0)
    assert reading.uptime_s == pytest.approx(156.5, abs=0.1)
    assert reading.counts == Counts(reading.counts.prompted, 3083, 1614, 1614, 1338, (1338,))
    assert (reading.counts.prompted or 0) > 0
