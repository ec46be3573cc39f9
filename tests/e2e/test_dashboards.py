"""The queries of all dashboard panels, in a real Prometheus that scrapes a real server."""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.dashboards import Query, annotations, queries
from tests.support.monitoring import Prometheus, prometheus
from tests.support.processes import Server, server
from tests.support.programs import program
from tests.support.serving import ADMIN, ADMIN_KEY
from tests.support.stores import labelled_sentences
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

QUERIES = queries()
EVENTS = annotations()
TEXTS = [text for text, _ in labelled_sentences()]
TRACE = "0af7651916cd43dd8448eb211c80319c"
WINDOW = {"window": "6s", "span": "5m"}

LOADED = {
    "service": {"Requests", "Latency p99", "Saturation", "Requests by outcome", "Latency", "Stages",
                "Latency, all requests", "Texts"},
    "budgets": {"Compute saved", "Heads per text", "Answered at step 0", "Texts", "Texts by step",
                "Distribution over steps", "Texts per batch", "Tokens per batch", "Batches",
                "Compute spent", "Tokens per text", "Truncated", "Steps answered, in this range",
                "Steps as calibrated, in this range"},
    "engines": {"Engines alive", "Models", "Memory", "Batches", "Versions served", "Program",
                "Loads", "Weights", "Texts by version"},
    "models": {"Requests by model", "Latency p99 by model", "Requests of each version",
               "Latency p50 of each version", "Latency p99 of each version",
               "Heads per text of each version", "Multiply-adds per text of each version",
               "Texts by step, first version", "Texts by step, second version", "Candidates",
               "Shadow texts", "Cost of shadow texts"},
}  # fmt: skip
"""Panels that show more than 0 under load."""


@dataclass(frozen=True)
class Seen:
    """The results of each query before the first request and under load."""

    idle: dict[Query, list[float]]
    loaded: dict[Query, list[float]]
    prometheus: Prometheus


def query_all(monitor: Prometheus) -> dict[Query, list[float]]:
    return {query: monitor.values(query.filled(**WINDOW)) for query in QUERIES}


@contextmanager
def load(url: str) -> Iterator[None]:
    """Send requests of every quality one after the other until the block ends."""
    enough = threading.Event()

    def send() -> None:
        headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            for quality in itertools.cycle(["fast", "balanced", "best"]):
                if enough.is_set():
                    return
                body = {"input": [*TEXTS[:12], "otter " * 100], "quality": quality}
                assert client.post("/classify", json=body).status_code == 200

    sending = threading.Thread(target=send)
    sending.start()
    try:
        yield
    finally:
        enough.set()
        sending.join()


@pytest.fixture(scope="module")
def seen(model_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    program("prometheus")
    folder = tmp_path_factory.mktemp("monitored")
    with (
        server(
            model_store,
            folder,
            engines=2,
            default_model="topics",
            admin_key=ADMIN_KEY,
            state_dir=str(folder / "state"),
        ) as running,
        prometheus(running.url, folder) as monitor,
    ):
        wait_until(lambda: _scrapes(monitor) >= 4, "some scrapes of an idle service")
        idle = query_all(monitor)
        rollout = {"version": 1, "weight": 0.5, "shadow": 1.0}
        url = f"{running.url}/models/topics/rollout"
        assert httpx.post(url, json=rollout, headers=ADMIN, timeout=60).status_code == 200
        before = _scrapes(monitor)
        with load(running.url):
            wait_until(lambda: _scrapes(monitor) >= before + 6, "some scrapes under load")
            loaded = query_all(monitor)
        _wait_for_reports(running, monitor)
        yield Seen(idle, loaded, monitor)


def _scrapes(monitor: Prometheus) -> float:
    (count,) = monitor.values('count_over_time(up{job="budgetformer"}[10m])')
    return count


def _wait_for_reports(running: Server, monitor: Prometheus) -> None:
    answered = running.scrape().total("items_total")
    wait_until(
        lambda: monitor.values("sum(budgetformer_items_total)") == [answered], "the last scrape"
    )


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_panels_of_an_idle_server_have_data(seen: Seen, query: Query) -> None:
    assert seen.idle[query], query.filled(**WINDOW)
    assert all(math.isfinite(value) and value >= 0 for value in seen.idle[query])


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_panels_show_the_load(seen: Seen, query: Query) -> None:
    values = seen.loaded[query]
    assert values, query.filled(**WINDOW)
    assert all(map(math.isfinite, values))
    if query.panel in LOADED[query.board]:
        assert max(values) > 0, query.filled(**WINDOW)


def test_panels_expected_to_show_load_exist() -> None:
    panels = {(query.board, query.panel) for query in QUERIES}
    assert {(board, panel) for board, names in LOADED.items() for panel in names} <= panels


@pytest.mark.parametrize("query", EVENTS, ids=str)
def test_event_queries_use_existing_series(seen: Seen, query: Query) -> None:
    asked = query.filled(**WINDOW)
    seen.prometheus.values(asked)
    for series in set(re.findall(r"budgetformer_\w+", asked)):
        assert seen.prometheus.values(series), series


def test_a_model_load_is_an_event(seen: Seen) -> None:
    (loads,) = {event.filled(**WINDOW) for event in EVENTS if event.panel == "Model loads"}
    ever = f"max_over_time(({loads})[10m:1s])"  # the event itself lasts for one minute
    assert seen.prometheus.values(f"count(count by (model) ({ever}))") == [5]


def test_shares_are_between_0_and_1(seen: Seen) -> None:
    by_panel = {query.panel: seen.loaded[query] for query in QUERIES}
    assert sum(by_panel["Distribution over steps"]) == pytest.approx(1)
    for panel in ("Compute saved", "Answered at step 0", "Drift", "Saturation", "Compute spent"):
        assert all(0 <= value <= 1.05 for value in by_panel[panel]), panel


def test_expected_texts_are_as_many_as_answered_ones(seen: Seen) -> None:
    answered, expected = (
        seen.prometheus.values(f"sum(budgetformer_{name}_total)")
        for name in ("items", "items_expected")
    )
    assert expected == pytest.approx(answered)


def test_prometheus_stores_exemplars_with_traces(seen: Seen) -> None:
    found = seen.prometheus.api(
        "query_exemplars",
        query="budgetformer_request_duration_seconds_bucket",
        start="0",
        end="9999999999",
    )
    traces = {
        exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]
    }
    assert traces == {TRACE}


def test_rules_are_evaluated_and_no_alert_fires(seen: Seen) -> None:
    groups = seen.prometheus.api("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 30
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
