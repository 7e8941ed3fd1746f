"""benchmarks.routing_faults: the router of `make serve` before stand-ins that end."""

from __future__ import annotations

from ports import free_ports

from benchmarks.routing_faults import Load, run


def test_a_replica_that_ends_costs_nothing_and_a_request_ends_two() -> None:
    load = Load(replicas=3, clients=4, fault_s=1, away_s=1, rest_s=4)
    faults = run(load, free_ports(2 + load.replicas), [])["make serve"]
    one = faults["a replica ends"]
    assert one["answered"] > 10 and one["lost"] == {}
    assert one["requests_of_the_one_that_is_back"]
    assert faults["a request ends replicas"]["replicas_ended"] == 2
