"""The metrics profile: what Prometheus reads, and a dashboard of queries over what real servers export."""

from __future__ import annotations

import re
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
import yaml
from dashboard import CONFIG, DASHBOARD, FOLDER, PANELS, QUERIES, Query, program

ROOT = Path(__file__).resolve().parents[2]
DATASOURCE = yaml.safe_load((FOLDER / "grafana/datasources/prometheus.yml").read_text(encoding="utf-8"))
PROVIDER = yaml.safe_load((FOLDER / "grafana/dashboards/provider.yml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
# What a vLLM with drafts and a haproxy with two servers answered, without what no query reads.
EXPORTED = (ROOT / "tests/data/metrics.txt").read_text(encoding="utf-8")
COLUMNS = 24


def test_ids_and_titles_tell_panels_apart() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [(panel["title"], panel["type"]) for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows_in_which_unit_and_from_where(panel: dict[str, Any]) -> None:
    (provisioned,) = DATASOURCE["datasources"]
    assert panel["description"].endswith(".")
    assert panel["datasource"] == {"type": provisioned["type"], "uid": provisioned["uid"]}
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


def test_panels_fill_the_dashboard_and_none_lies_on_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
    rows = max(y for _, y in taken) + 1
    assert taken.keys() == {(x, y) for x in range(COLUMNS) for y in range(rows)}


def test_every_query_of_a_replica_follows_the_choice_of_replicas() -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    assert variable["name"] == "replica"
    selectors = [
        selector
        for panel in PANELS
        for target in panel["targets"]
        for selector in re.findall(r"(?:vllm:|v4forge_)\w+(\{.*?\})?", target["expr"])
    ]
    assert set(selectors) == {'{instance=~"$replica"}'}


def test_counters_and_nothing_else_are_read_over_a_range() -> None:
    for query in QUERIES:
        for name, ranged in re.findall(r"((?:vllm:|haproxy_|v4forge_)\w+)(?:\{[^}]*\})?(\[)?", query.text):
            assert bool(ranged) == name.endswith(("_total", "_bucket")), query


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel}: {query.legend}")
def test_real_servers_export_every_metric_and_label_that_a_query_names(query: Query) -> None:
    exported = {
        match[1]: set(re.findall(r'(\w+)="', match[2] or "")) | {"instance"}  # Prometheus' own
        for match in re.finditer(r"^([a-z0-9_:]+)(?:\{(.*)\})? \S+$", EXPORTED, flags=re.MULTILINE)
    }
    names = set(re.findall(r"(?:vllm:|haproxy_|v4forge_)\w+", query.text))
    assert names <= exported.keys()
    known = set().union(*(exported[name] for name in names))
    labels = re.findall(r'(\w+)=~?"', query.text) + re.findall(r"\{\{(\w+)\}\}", query.legend)
    labels += [label for by in re.findall(r"by \(([\w, ]+)\)", query.text) for label in by.split(", ")]
    assert set(labels) <= known


def test_the_dashboard_is_where_the_provider_looks_for_it() -> None:
    mounts = [volume.split(":") for volume in COMPOSE["services"]["grafana"]["volumes"]]
    ((source, target, _),) = [mount for mount in mounts if mount[0].startswith("./")]
    (provider,) = PROVIDER["providers"]
    folder = Path(provider["options"]["path"]).relative_to(target)
    assert (ROOT / source / folder / "dashboard.json").is_file()


def test_grafana_reads_the_prometheus_of_the_profile() -> None:
    (datasource,) = DATASOURCE["datasources"]
    assert urllib.parse.urlparse(datasource["url"]).hostname in COMPOSE["services"]
    assert datasource["jsonData"]["timeInterval"] == CONFIG["global"]["scrape_interval"]


def test_prometheus_reads_the_names_and_ports_that_compose_gives() -> None:
    replica, router = CONFIG["scrape_configs"]
    (discovery,) = replica["dns_sd_configs"]
    for name, service in COMPOSE["services"].items():
        if name.startswith("replica"):
            assert service["networks"]["inside"]["aliases"] == discovery["names"]
    (static,) = router["static_configs"]
    host, _, port = static["targets"][0].partition(":")
    assert any(mapping.endswith(f":{port}") for mapping in COMPOSE["services"][host]["ports"])
    assert {"inside"} <= set(COMPOSE["services"][host]["networks"]) & set(COMPOSE["services"]["prometheus"]["networks"])


@pytest.mark.serve
def test_promtool_finds_no_fault_in_the_configuration() -> None:
    command = [program("promtool"), "check", "config", str(FOLDER / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check_rules(folder: Path, expressions: list[str]) -> subprocess.CompletedProcess[str]:
    """promtool's parser over the queries, as the rules of a file."""
    rules = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(expressions)]
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    return subprocess.run([program("promtool"), "check", "rules", str(path)], capture_output=True, text=True)


@pytest.mark.serve
def test_every_query_is_promql(tmp_path: Path) -> None:
    done = check_rules(tmp_path, [query.text for query in QUERIES])
    assert done.returncode == 0, done.stdout + done.stderr
    assert check_rules(tmp_path, ["sum by (le) rate(x[1m])"]).returncode != 0
