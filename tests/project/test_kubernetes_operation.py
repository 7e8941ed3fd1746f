"""docs/kubernetes beside the replicas: who reaches them, what reads their metrics, how many are there, the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from v4forge.serving import settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs/kubernetes"
EXPORTED = (ROOT / "tests/data/metrics.txt").read_text(encoding="utf-8")
GPU = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


OBJECTS = {(item["kind"], item["metadata"]["name"]): item for item in read("replicas.yaml")["items"]}
SET = OBJECTS["StatefulSet", "v4forge"]["spec"]
LABELS = SET["template"]["metadata"]["labels"]


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_the_policy_is_one_of_the_replicas_and_lets_nothing_out(version: str) -> None:
    policy = read("network.yaml")
    kubernetes_validate.validate(policy, version, strict=True)
    spec = policy["spec"]
    assert spec["podSelector"]["matchLabels"].items() <= LABELS.items()
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"} and spec["egress"] == []
    (rule,) = spec["ingress"]
    assert all(peer for peer in rule["from"])  # an empty one is everybody
    ports = {port["name"] for port in SET["template"]["spec"]["containers"][0]["ports"]}
    assert {port["port"] for port in rule["ports"]} <= ports


def test_the_monitor_finds_one_service_so_that_no_replica_is_read_twice() -> None:
    spec = read("monitor.yaml")["spec"]
    wanted = spec["selector"]["matchLabels"].items()
    found = [
        item
        for (kind, _), item in OBJECTS.items()
        if kind == "Service" and wanted <= item["metadata"]["labels"].items()
    ]
    (service,) = found
    assert service["metadata"]["name"] == SET["serviceName"]
    assert {each["port"] for each in spec["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}


def test_replicas_are_scaled_by_what_waits_before_as_many_wait_as_run() -> None:
    spec = read("scaling.yaml")["spec"]
    target = spec["scaleTargetRef"]
    assert (target["kind"], target["name"]) in OBJECTS
    assert spec["minReplicaCount"] == SET["replicas"] < spec["maxReplicaCount"]
    (trigger,) = spec["triggers"]
    query = trigger["metadata"]["query"]
    name, _, job = query.removeprefix("sum(").partition("{")
    assert f"\n{name}{{" in EXPORTED and job == f'job="{SET["serviceName"]}"}})'  # the operator's job is the Service
    assert int(trigger["metadata"]["threshold"]) < settings.serving(settings.PRODUCTION).max_num_seqs


def test_replicas_may_run_on_nodes_that_are_kept_for_gpus() -> None:
    assert GPU in SET["template"]["spec"]["tolerations"]
    assert GPU in read("values.yaml")["servingEngineSpec"]["tolerations"]


def test_llm_ds_router_finds_the_replicas_and_weighs_their_caches() -> None:
    router = read("llm-d.yaml")["router"]
    servers, picker = router["modelServers"], router["epp"]
    assert servers["matchLabels"].items() <= LABELS.items()
    ports = {port["containerPort"] for port in SET["template"]["spec"]["containers"][0]["ports"]}
    assert {each["number"] for each in servers["targetPorts"]} == ports
    config = yaml.safe_load(picker["pluginsCustomConfig"][picker["pluginsConfigFile"]])
    (profile,) = config["schedulingProfiles"]
    weights = {each["pluginRef"]: each["weight"] for each in profile["plugins"]}
    assert weights.keys() == {each["type"] for each in config["plugins"]}
    assert max(weights, key=weights.__getitem__) == "prefix-cache-scorer"
