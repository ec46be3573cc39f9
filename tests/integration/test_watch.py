"""Metrics of engines that start, stop and change."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from service.control.catalog import Catalog
from service.control.engine_watch import EngineWatch
from service.ipc.engine_client import Disconnected, EngineClient
from service.ipc.engine_messages import PROTOCOL, BatchReport, Heartbeat, Hello, ModelInfo, Models
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.support.exposition import Exposition

BEAT = Heartbeat({"topics": 3}, {"topics": 0.5}, {"topics": 2.0}, {"topics": 4}, 1000, "balanced")


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics()
    metrics.register_engines(2)
    return metrics


@pytest.fixture
def catalog(model_store: Path) -> Catalog:
    return Catalog(Settings(model_store=model_store, models=["topics"]))


@pytest.fixture
def watch(metrics: Metrics, catalog: Catalog) -> EngineWatch:
    return EngineWatch(metrics, catalog, lambda _, level: level)


def scrape(metrics: Metrics) -> Exposition:
    return Exposition(generate_latest(metrics.registry).decode())


def hello(pid: int) -> Hello:
    return Hello(PROTOCOL, pid, "cpu", "2", [])


def test_queue_metrics_are_sums_over_engines(metrics: Metrics, watch: EngineWatch) -> None:
    watch(0, BEAT)
    watch(1, BEAT)
    exposition = scrape(metrics)
    assert exposition.total("queue_items", model="topics") == 6
    assert exposition.total("queue_cost_seconds", model="topics") == 1.0
    assert exposition.total("in_flight_items", model="topics") == 8
    assert exposition.total("queue_oldest_age_seconds", model="topics") == 2.0


def test_the_queue_of_a_lost_engine_is_not_counted(metrics: Metrics, watch: EngineWatch) -> None:
    watch(0, BEAT)
    watch(1, BEAT)
    watch(0, Disconnected())
    assert scrape(metrics).total("queue_items") == 3
    watch(1, Disconnected())
    exposition = scrape(metrics)
    for name in ("queue_items", "queue_cost_seconds", "queue_oldest_age_seconds"):
        assert exposition.total(name, model="topics") == 0
    assert exposition.total("device_memory_bytes") == 0


def test_another_process_at_the_same_index_is_a_restart(
    metrics: Metrics, watch: EngineWatch
) -> None:
    for index, pid in ((0, 11), (1, 12), (0, 11), (0, 13)):
        watch(index, hello(pid))
    assert scrape(metrics).total("engine_restarts_total") == 1


def test_the_busy_time_of_a_device_is_the_time_of_its_passes(
    metrics: Metrics, watch: EngineWatch
) -> None:
    watch(1, BatchReport("topics", 2, 1, 8, 80, 0.0, 0.25))
    watch(1, BatchReport("topics", 2, 0, 8, 80, 0.0, 0.05))
    busy = scrape(metrics).by("engine", "device_busy_seconds_total")
    assert busy == {"1": pytest.approx(0.3)}


def test_clipped_states_are_counted_by_model_and_version(
    metrics: Metrics, watch: EngineWatch
) -> None:
    metrics.register_model("topics", "2", range(3))
    for clipped in (3, 4):
        watch(1, BatchReport("topics", 2, 1, 8, 80, 0.0, 0.25, checked=100, clipped=clipped))
    exposition = scrape(metrics)
    assert exposition.total("int8_states_checked_total", model="topics", version="2") == 200
    assert exposition.total("int8_states_clipped_total", model="topics", version="2") == 7


def test_the_heartbeat_age_grows_for_an_engine_that_never_connected(
    metrics: Metrics, watch: EngineWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [EngineClient(i, Path("nowhere"), watch) for i in range(2)]
    now = time.monotonic()
    clients[1].last_seen = now + 60
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    watch.refresh(clients)
    ages = scrape(metrics).by("engine", "engine_heartbeat_age_seconds")
    assert ages["0"] >= 61
    assert ages["1"] == pytest.approx(1)


def test_an_engine_restarted_with_another_precision_is_described_once(
    metrics: Metrics, watch: EngineWatch
) -> None:
    for dtype in ("float32", "bfloat16"):
        watch(0, hello(11))
        watch(0, Models([ModelInfo("topics", 2, 0.5, 100, dtype)]))
    (info,) = scrape(metrics).select("model_info")
    assert info.labels["dtype"] == "bfloat16"


def test_engines_of_two_precisions_are_both_described(metrics: Metrics, watch: EngineWatch) -> None:
    for index, dtype in enumerate(("float32", "bfloat16")):
        watch(index, hello(11 + index))
        watch(index, Models([ModelInfo("topics", 2, 0.5, 100, dtype)]))
    assert {s.labels["dtype"] for s in scrape(metrics).select("model_info")} == {
        "float32",
        "bfloat16",
    }


def test_a_withdrawn_model_keeps_its_counters_but_not_its_description(
    metrics: Metrics, watch: EngineWatch, catalog: Catalog
) -> None:
    watch(0, hello(11))
    watch(0, Models([ModelInfo("topics", 2, 0.5, 100, "float32")]))
    metrics.macs.labels("topics", "2").inc(5)
    catalog.withdraw("topics")
    watch.show_models()
    exposition = scrape(metrics)
    assert exposition.total("macs_total", model="topics") == 5
    for name in ("model_info", "model_load_seconds", "model_memory_bytes"):
        assert not exposition.select(name)


def test_late_reports_of_engines_create_no_series_of_a_removed_model(
    metrics: Metrics, watch: EngineWatch, catalog: Catalog
) -> None:
    metrics.register_model("topics", "2", range(3))
    watch(0, BEAT)
    catalog.withdraw("topics")
    metrics.forget_model("topics", "2")
    metrics.forget_model_name("topics")
    metrics.quality_level.remove("topics")
    watch.forget_model("topics")
    watch(0, BEAT)
    watch(0, BatchReport("topics", 2, 1, 8, 80, 0.0, 0.25, dropped=3))
    assert 'model="' not in generate_latest(metrics.registry).decode()
    assert scrape(metrics).by("source", "dropped_reports_total") == {"engine": 3}
