"""docker/metrics/alerts.yml: rules that Prometheus takes, over what real servers export; each fires and is quiet."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from alerts import ALERTS, FILE, RULES, selected
from dashboard import CONFIG, FOLDER, program

from v4forge.serving.probe import FLOOR

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests/data/alerts.yml"
EXPORTED = (ROOT / "tests/data/metrics.txt").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
by_name = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])


@by_name
def test_an_alert_says_what_is_wrong_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"].keys() == {"summary", "do"}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    command = re.match(r"make ([a-z -]+)", alert["annotations"]["do"])
    assert command and command[1].split()[0] in targets


@by_name
def test_an_alert_has_a_case_in_which_it_fires(alert: dict[str, Any]) -> None:
    labels = f'alertname="{alert["alert"]}", severity="{alert["labels"]["severity"]}"'
    assert f"{{{labels}}}" in CASES.read_text(encoding="utf-8")


def test_real_servers_export_what_rules_select() -> None:
    names = {name for name, _ in selected()} - {"up"}
    assert {name for name in names if not re.search(rf"^{name}[{{ ]", EXPORTED, flags=re.MULTILINE)} == set()


def test_drafts_are_held_to_what_a_start_asks_for() -> None:
    (rejected,) = [alert for alert in ALERTS if alert["alert"] == "DraftsRejected"]
    assert f" < {FLOOR}\n" in f"{rejected['expr']}\n".replace(" and", "\n")


def test_prometheus_finds_the_rules_beside_its_configuration() -> None:
    assert CONFIG["rule_files"] == [FILE.name]
    mounted = [volume.split(":")[:2] for volume in COMPOSE["services"]["prometheus"]["volumes"]]
    there = {target: ROOT / source for source, target in mounted}
    assert there["/etc/prometheus/alerts.yml"] == FILE and there["/etc/prometheus/prometheus.yml"].parent == FOLDER


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("promtool"), *map(str, words)], capture_output=True, text=True)


@pytest.mark.serve
def test_promtool_takes_the_rules() -> None:
    done = promtool("check", "rules", FILE)
    assert done.returncode == 0 and f"{len(RULES)} rules found" in done.stdout, done.stdout + done.stderr


@pytest.mark.serve
def test_each_fires_when_it_should_and_is_quiet_otherwise(tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path / "alerts.yml")
    shutil.copy(CASES, tmp_path / "cases.yml")
    done = promtool("test", "rules", tmp_path / "cases.yml")
    assert done.returncode == 0, done.stdout + done.stderr
