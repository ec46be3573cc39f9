"""The dashboard and the rules ask only for what the service measures."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from service.observability.metrics import Metrics

DOCKER = Path(__file__).parents[2] / "docker"
RULES = sorted((DOCKER / "prometheus" / "rules").glob("*.yml"))
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCKER / "grafana" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def series() -> set[str]:
    return {
        family.name + suffix
        for family in Metrics().registry.collect()
        for suffix in SUFFIXES[family.type]
    }


@pytest.fixture(scope="module")
def dashboard() -> dict[str, object]:
    text = (DOCKER / "grafana" / "dashboards" / "service.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def strings(value: object, key: str) -> Iterator[str]:
    """Yield every string that lies under `key`, however deep."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, str):
                yield inner
            else:
                yield from strings(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner, key)


def asked_for(query: str) -> set[str]:
    """Return the metrics that a query names; a recorded one has colons and is not ours."""
    return set(re.findall(r"(?<![\w:])budgetformer_\w+", query))


def test_the_file_is_what_the_generator_writes(generator: ModuleType) -> None:
    assert generator.OUTPUT.read_text(encoding="utf-8") == generator.render(), (
        "run: python docker/grafana/generate.py"
    )


def test_every_panel_asks_for_metrics_that_exist(
    dashboard: dict[str, object], series: set[str]
) -> None:
    queries = [*strings(dashboard, "expr"), *strings(dashboard, "query")]
    assert len(queries) > 20
    for query in queries:
        assert asked_for(query), query
        assert asked_for(query) <= series, query


def test_every_chart_reads_the_provisioned_data_source(dashboard: dict[str, object]) -> None:
    provisioned = yaml.safe_load(
        (DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    )
    panels = dashboard["panels"]
    assert isinstance(panels, list)
    asked = {
        target["datasource"]["uid"] for panel in panels for target in panel.get("targets") or []
    }
    assert asked == {source["uid"] for source in provisioned["datasources"]}


def test_panels_have_titles_and_places_of_their_own(dashboard: dict[str, object]) -> None:
    panels = dashboard["panels"]
    assert isinstance(panels, list)
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert all(panel["title"] for panel in panels)


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_every_rule_asks_for_metrics_that_exist(path: Path, series: set[str]) -> None:
    rules = [
        rule
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]
    assert rules
    for rule in rules:
        assert asked_for(rule["expr"]) <= series, rule["expr"]
        if "alert" in rule:
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["description"]
            assert rule["labels"]["severity"] in {"info", "warning", "critical"}
