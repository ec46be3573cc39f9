"""The dashboards and the rules ask only for what the service measures."""

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


def asked_for(query: str) -> set[str]:
    """Return the metrics that a query names; a recorded one has colons and is not ours."""
    return set(re.findall(r"(?<![\w:])budgetformer_\w+", query))


def test_the_files_are_what_the_generator_writes(generator: ModuleType) -> None:
    rendered = generator.render()
    assert set(rendered) == set(BOARDS.values())
    for path, text in rendered.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docker/grafana/generate.py"


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_has_only_what_grafanas_schema_has(name: str) -> None:
    register_default_plugins()
    read = Dashboard.from_json(read_board(name))
    assert json.loads(JSONEncoder().encode(read)) == read_board(name)


@pytest.mark.parametrize("query", [*queries(), *annotations()], ids=str)
def test_every_query_asks_for_metrics_that_exist(query: Query, series: set[str]) -> None:
    assert asked_for(query.expression) <= series
    assert asked_for(query.expression) or RECORDED.search(query.expression)


@pytest.mark.parametrize("name", MEASURING)
def test_a_dashboard_is_filtered_by_model_and_version(name: str, series: set[str]) -> None:
    variables = read_board(name)["templating"]["list"]
    names = [variable["name"] for variable in variables]
    compared = ["first", "second"] if name == "models" else []
    assert names == ["datasource", "model", "version", *compared]
    for variable in variables[1:]:
        assert asked_for(variable["query"]) <= series
        assert variable.get("multi", False) == (variable["name"] not in compared)
        assert variable.get("includeAll", False) == (variable["name"] not in compared)


def test_versions_are_compared_by_every_measure() -> None:
    """A panel shows both versions, or there are two of them."""
    both, first, second = 'version=~"$first|$second"', 'version=~"$first"', 'version=~"$second"'
    asked = [query.expression for query in queries() if query.board == "models"]
    for metric in (
        "model_requests_total", "model_request_duration_seconds_bucket", "request_heads_sum",
        "macs_total", "items_total",
    ):  # fmt: skip
        naming = [one for one in asked if f"budgetformer_{metric}{{" in one]
        assert any(both in one for one in naming) or (
            any(first in one for one in naming) and any(second in one for one in naming)
        ), metric


@pytest.mark.parametrize("name", MEASURING)
def test_a_dashboard_shows_model_loads_and_brown_outs(name: str) -> None:
    events = [event for event in annotations() if event.board == name]
    assert {event.panel for event in events} == {"Model loads", "Brown-outs"}


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_leads_to_the_others_and_to_the_runbooks(name: str) -> None:
    board = read_board(name)
    links = board["links"]
    assert {"dashboards", "link"} == {link["type"] for link in links}
    assert any(link.get("url") == "/d/budgetformer-runbooks" for link in links)
    assert board["uid"] == f"budgetformer-{name}"
    assert all(set(link["tags"]) <= set(board["tags"]) for link in links if link.get("tags"))


@pytest.mark.parametrize("name", MEASURING)
def test_every_query_reads_the_data_source_that_a_variable_names(name: str) -> None:
    """No Grafana but the one under Compose has a data source of a known id."""
    board = read_board(name)
    first, *others = board["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == (
        "datasource", "datasource", "prometheus",
    )  # fmt: skip
    assert first.get("current", {}).get("value") is None
    asked = [
        *(variable["datasource"] for variable in others),
        *(event["datasource"] for event in board["annotations"]["list"] if "expr" in event),
        *(panel["datasource"] for panel in board["panels"] if panel["type"] != "row"),
        *(
            target["datasource"]
            for panel in board["panels"]
            for target in panel.get("targets") or []
        ),
    ]
    assert asked
    assert all(one == {"type": "prometheus", "uid": "${datasource}"} for one in asked)
    provisioned = yaml.safe_load(
        (DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    )
    assert "prometheus" in {source["type"] for source in provisioned["datasources"]}


@pytest.mark.parametrize("name", BOARDS)
def test_no_dashboard_holds_the_id_of_a_data_source(name: str) -> None:
    text = json.dumps(read_board(name))
    named = set(re.findall(r'"type": "prometheus", "uid": "([^"]*)"', text))
    assert named <= {"${datasource}"}
    assert '"uid": "prometheus"' not in text


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_titles_and_places_of_their_own(name: str) -> None:
    panels = read_board(name)["panels"]
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


@pytest.mark.parametrize("name", MEASURING)
def test_every_panel_says_what_it_shows(name: str) -> None:
    for panel in read_board(name)["panels"]:
        assert panel["type"] == "row" or panel["description"].endswith("."), panel["title"]


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
