"""Grafana's dashboards and Prometheus's rules are current and query existing metrics."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from service.telemetry.metrics import Metrics
from tests.support.dashboards import BOARDS, MEASURING, Query, annotations, queries, read_board

DOCKER = Path(__file__).parents[2] / "docker"
RULES = sorted((DOCKER / "prometheus" / "rules").glob("*.yml"))
RECORDED = re.compile(r"budgetformer:\w+|ALERTS")
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCKER / "grafana")
        yield importlib.import_module("generate")


@pytest.fixture(scope="module")
def series() -> set[str]:
    return {
        family.name + suffix
        for family in Metrics().registry.collect()
        for suffix in SUFFIXES[family.type]
    }


def metrics_in(query: str) -> set[str]:
    """Return the service's metrics in a query; names with colons are recorded series."""
    return set(re.findall(r"(?<![\w:])budgetformer_\w+", query))


def test_the_generated_files_are_current(generator: ModuleType) -> None:
    rendered = generator.render()
    assert set(rendered) == set(BOARDS.values())
    for path, text in rendered.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docker/grafana/generate.py"


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_conform_to_grafanas_schema(name: str) -> None:
    register_default_plugins()
    read = Dashboard.from_json(read_board(name))
    assert json.loads(JSONEncoder().encode(read)) == read_board(name)


@pytest.mark.parametrize("query", [*queries(), *annotations()], ids=str)
def test_queries_use_existing_metrics(query: Query, series: set[str]) -> None:
    assert metrics_in(query.expression) <= series
    assert metrics_in(query.expression) or RECORDED.search(query.expression)


@pytest.mark.parametrize("name", MEASURING)
def test_dashboards_have_filters_for_model_and_version(name: str, series: set[str]) -> None:
    variables = read_board(name)["templating"]["list"]
    names = [variable["name"] for variable in variables]
    compared = ["first", "second"] if name == "models" else []
    assert names == ["datasource", "model", "version", *compared]
    for variable in variables[1:]:
        assert metrics_in(variable["query"]) <= series
        assert variable.get("multi", False) == (variable["name"] not in compared)
        assert variable.get("includeAll", False) == (variable["name"] not in compared)


def test_versions_are_compared_by_every_measure() -> None:
    """One panel shows both versions, or each version has its panel."""
    both, first, second = 'version=~"$first|$second"', 'version=~"$first"', 'version=~"$second"'
    expressions = [query.expression for query in queries() if query.board == "models"]
    for metric in (
        "model_requests_total", "model_request_duration_seconds_bucket", "request_heads_sum",
        "macs_total", "items_total",
    ):  # fmt: skip
        of_metric = [text for text in expressions if f"budgetformer_{metric}{{" in text]
        assert any(both in text for text in of_metric) or (
            any(first in text for text in of_metric) and any(second in text for text in of_metric)
        ), metric


@pytest.mark.parametrize("name", MEASURING)
def test_dashboards_show_model_loads_and_brown_outs(name: str) -> None:
    events = [event for event in annotations() if event.board == name]
    assert {event.panel for event in events} == {"Model loads", "Brown-outs"}


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_link_to_the_others_and_to_the_runbooks(name: str) -> None:
    board = read_board(name)
    links = board["links"]
    assert {"dashboards", "link"} == {link["type"] for link in links}
    assert any(link.get("url") == "/d/budgetformer-runbooks" for link in links)
    assert board["uid"] == f"budgetformer-{name}"
    assert all(set(link["tags"]) <= set(board["tags"]) for link in links if link.get("tags"))


@pytest.mark.parametrize("name", MEASURING)
def test_queries_use_the_data_source_of_a_variable(name: str) -> None:
    """Only the Grafana of docker-compose.yml has a data source with a known id."""
    board = read_board(name)
    first, *others = board["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource", "datasource", "prometheus",
    )  # fmt: skip
    assert first.get("current", {}).get("value") is None
    sources = [
        *(variable["datasource"] for variable in others),
        *(event["datasource"] for event in board["annotations"]["list"] if "expr" in event),
        *(panel["datasource"] for panel in board["panels"] if panel["type"] != "row"),
        *(
            target["datasource"]
            for panel in board["panels"]
            for target in panel.get("targets") or []
        ),
    ]
    assert sources
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    provisioned = yaml.safe_load(
        (DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    )
    assert "prometheus" in {source["type"] for source in provisioned["datasources"]}


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_have_no_data_source_ids(name: str) -> None:
    text = json.dumps(read_board(name))
    named = set(re.findall(r'"type": "prometheus", "uid": "([^"]*)"', text))
    assert named <= {"${datasource}"}
    assert '"uid": "prometheus"' not in text


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_titles_and_do_not_overlap(name: str) -> None:
    panels = read_board(name)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for area in (panel["gridPos"] for panel in panels)
        for x in range(area["x"], area["x"] + area["w"])
        for y in range(area["y"], area["y"] + area["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert all(panel["title"] for panel in panels)


@pytest.mark.parametrize("name", MEASURING)
def test_panels_have_descriptions(name: str) -> None:
    for panel in read_board(name)["panels"]:
        assert panel["type"] == "row" or panel["description"].endswith("."), panel["title"]


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_rules_use_existing_metrics(path: Path, series: set[str]) -> None:
    rules = [
        rule
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]
    assert rules
    for rule in rules:
        assert metrics_in(rule["expr"]) <= series, rule["expr"]
