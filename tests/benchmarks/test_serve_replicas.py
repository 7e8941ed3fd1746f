"""benchmarks.serve_replicas: what becomes of requests, as counts."""

from __future__ import annotations

from benchmarks.clients import Outcome
from benchmarks.serve_replicas import told


def test_an_answer_broken_off_is_not_a_request_that_failed_before_it_began() -> None:
    outcomes = [
        Outcome(200, "0", "whole", "length"),
        Outcome(200, "1", "whole", "stop"),
        Outcome(200, "1", "begun", error="broken off"),
        Outcome(503, body={}),
    ]
    assert told(outcomes) == {
        "whole": 2,
        "whole_by_replica": {"0": 1, "1": 1},
        "broken_off": 1,
        "failed_before_a_token": 1,
        "errors": ["503", "broken off"],
    }
