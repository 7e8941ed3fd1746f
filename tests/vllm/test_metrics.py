"""A real Prometheus reads real replicas and the router as the metrics profile does: every query of the dashboard gives
numbers."""

from __future__ import annotations

import copy
import json
import math
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import alerts
import pytest
import yaml
from dashboard import CONFIG, DASHBOARD, QUERIES, Query, program
from served import Served
from watchdog_program import watchdog

from benchmarks.clients import message

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]


@contextmanager
def running(command: list[str], ready: str, log: Path) -> Iterator[None]:
    """The program, from its first good answer at the URL `ready` on."""
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(ready, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def prometheus(tiny: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus with the profile's configuration, but for addresses and intervals."""
    folder = tmp_path_factory.mktemp("prometheus")
    deployment = tiny.deployment
    config = copy.deepcopy(CONFIG)
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(alerts.FILE)]
    replica, router = config["scrape_configs"]
    del replica["dns_sd_configs"]
    addresses = [f"127.0.0.1:{deployment.replica_port(number)}" for number in range(deployment.replicas)]
    replica["static_configs"] = [{"targets": addresses}]
    router["static_configs"] = [{"targets": [urllib.parse.urlparse(deployment.admin_url).netloc]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program("prometheus"), f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with running(command, f"http://{address}/-/ready", folder / "prometheus.log"):
        yield f"http://{address}"


def values(prometheus: str, query: str) -> list[float]:
    """What the query gives now, a number a series."""
    url = f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{query}: {error.read().decode()}") from None
    return [float(series["value"][1]) for series in result]


@contextmanager
def load(tiny: Served) -> Iterator[None]:
    """Eight requests at a time, for as long as it lasts; all must end whole."""
    stop = threading.Event()
    # Of as many conversations, which the router spreads; one would stay where it is.
    requests = [message(f"{number} " + "a b c d " * 8, tokens=48, stream=True) for number in range(8)]
    broken: list[object] = []

    def ask() -> None:
        while not stop.is_set():
            broken.extend(outcome for outcome in tiny.ask_all(requests) if not outcome.whole)

    clients = threading.Thread(target=ask)
    clients.start()
    try:
        yield
    finally:
        stop.set()
        clients.join()
    assert broken == []


def told(query: Query, numbers: list[float], replicas: int) -> bool:
    """Whether under load the query says something, of each replica where it tells them apart: times and rates of tokens
    are more than nothing. A replica that has just come back has no rate before it was read twice."""
    least = math.ulp(0) if query.unit in ("s", "suffix: tok/s") else 0
    enough = len(numbers) == replicas if re.search(r"\{\{(instance|server)\}\}", query.legend) else bool(numbers)
    return enough and all(math.isfinite(number) and number >= least for number in numbers)


def test_every_query_of_the_dashboard_gives_numbers(tiny: Served, prometheus: str) -> None:
    replicas = tiny.deployment.replicas
    found: dict[Query, list[float]] = {}
    with load(tiny):
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            found = {query: values(prometheus, query.text) for query in QUERIES}
            empty = [query for query, numbers in found.items() if not told(query, numbers, replicas)]
            if not empty:
                break
            time.sleep(2)
    assert empty == []
    for query, numbers in found.items():
        if query.unit == "percentunit":
            assert max(numbers) <= 1, query
        if "{{position}}" in query.legend:
            assert len(numbers) == tiny.deployment.serving.drafts, query
        if (query.panel, query.kind) == ("Replicas up", "stat"):
            assert numbers == [replicas]


def test_prometheus_evaluates_every_rule_over_series_that_are_there(tiny: Served, prometheus: str) -> None:
    absent = alerts.selected()
    deadline = time.monotonic() + 60
    while absent and time.monotonic() < deadline:
        absent = {each for each in absent if not values(prometheus, "".join(each))}
        time.sleep(1)
    assert absent == set()
    with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=30) as answer:
        (group,) = json.load(answer)["data"]["groups"]
    assert [rule["health"] for rule in group["rules"]] == ["ok"] * len(alerts.RULES)


def test_replicas_export_what_the_watchdog_reads(tiny: Served) -> None:
    port = tiny.deployment.replica_port(0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    assert {name for name in watchdog.STEPS | watchdog.BUSY if f"\n{name}" not in text} == set()


def test_the_choice_of_replicas_lists_those_that_are_served(tiny: Served, prometheus: str) -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    match = re.fullmatch(r"label_values\((\S+), (\w+)\)", variable["query"]["query"])
    assert match
    deadline = time.monotonic() + 30
    while len(values(prometheus, f"count by ({match[2]}) ({match[1]})")) < tiny.deployment.replicas:
        assert time.monotonic() < deadline
        time.sleep(1)
