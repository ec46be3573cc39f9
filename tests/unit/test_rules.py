"""Prometheus's alert and recording rules: when they fire, and their texts and runbooks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from tests.support.programs import program

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
CASES = PROMETHEUS / "tests" / "alerts.yml"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(kind: str) -> list[dict[str, Any]]:
    groups = [group for path in RULES for group in read_yaml(path)["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def sections() -> list[str]:
    runbooks = (ROOT / "docs" / "runbooks.md").read_text(encoding="utf-8")
    return re.findall(r"^## (\w+)$", runbooks, flags=re.MULTILINE)


each_alert = pytest.mark.parametrize("alert", rules("alert"), ids=lambda rule: rule["alert"])


def promtool(*arguments: str | Path, seconds: float = 110) -> str:
    command = [program("promtool"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_accepts_the_rules() -> None:
    assert promtool("check", "rules", *RULES).count("SUCCESS") == len(RULES)


def test_prometheus_accepts_its_configuration() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.timeout(300)  # more than a minute of processor time on a slow machine
def test_alerts_fire_in_the_tested_cases_only() -> None:
    assert "SUCCESS" in promtool("test", "rules", CASES, seconds=290)


@each_alert
def test_every_alert_is_tested_firing_and_silent(alert: dict[str, Any]) -> None:
    checks = [
        check
        for case in read_yaml(CASES)["tests"]
        for check in case["alert_rule_test"]
        if check["alertname"] == alert["alert"]
    ]
    assert any(check["exp_alerts"] for check in checks)
    assert not all(check["exp_alerts"] for check in checks)


@each_alert
def test_every_alert_has_a_severity_and_a_description(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"info", "warning", "critical"}
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"].endswith(".")


@each_alert
def test_every_alert_links_to_its_runbook(alert: dict[str, Any]) -> None:
    assert alert["alert"] in sections()
    file, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert (ROOT / file).is_file()
    assert anchor == alert["alert"].lower()
    url = urlsplit(alert["annotations"]["runbook_url"])
    assert url.path == "/d/budgetformer-runbooks"
    (panel,) = parse_qs(url.query)["viewPanel"]
    assert panel == f"panel-{sections().index(alert['alert']) + 1}"


def test_every_runbook_belongs_to_an_alert() -> None:
    assert sections() == [rule["alert"] for rule in rules("alert")]


def test_rules_read_only_series_that_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules("record")}
    for rule in (*rules("record"), *rules("alert")):
        assert set(re.findall(r"budgetformer:[\w:]+", rule["expr"])) <= recorded
