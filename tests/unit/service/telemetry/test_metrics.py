"""The Prometheus metrics: names, labels, values, and series of removed models and keys."""

from __future__ import annotations

import os
import subprocess

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from service.telemetry.context import RequestContext, serving
from service.telemetry.counts import Counts, Difference, Observations
from service.telemetry.metrics import Metrics
from tests.support.counted import Spent, count_texts
from tests.support.exposition import Exposition
from tests.support.programs import program

DURATIONS = [
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.2, 0.5, 1, 2.5, 5, 10,
]  # fmt: skip

TRACE = "0af7651916cd43dd8448eb211c80319c"

CONTRACT = {
    "requests": ("counter", {"route", "outcome"}),
    "request_duration_seconds": ("histogram", {"route"}),
    "model_requests": ("counter", {"model", "version", "outcome"}),
    "model_request_duration_seconds": ("histogram", {"model", "version"}),
    "model_items_failed": ("counter", {"model", "version"}),
    "cache_hits": ("counter", {"model", "version"}),
    "cache_misses": ("counter", {"model", "version"}),
    "cache_bytes": ("gauge", set()),
    "request_heads": ("histogram", {"model", "version"}),
    "items": ("counter", {"model", "version", "budget"}),
    "items_expected": ("counter", {"model", "version", "budget"}),
    "item_tokens": ("histogram", {"model", "version"}),
    "stage_duration_seconds": ("histogram", {"stage"}),
    "macs": ("counter", {"model", "version"}),
    "dense_macs": ("counter", {"model", "version"}),
    "heads_used": ("counter", {"model", "version"}),
    "heads": ("counter", {"model", "version"}),
    "int8_states_checked": ("counter", {"model", "version"}),
    "int8_states_clipped": ("counter", {"model", "version"}),
    "batch_items": ("histogram", {"model", "budget"}),
    "batch_tokens": ("histogram", {"model", "budget"}),
    "batch_padding_ratio": ("histogram", {"model"}),
    "batches": ("counter", {"model", "budget"}),
    "queue_items": ("gauge", {"model"}),
    "queue_cost_seconds": ("gauge", {"model"}),
    "queue_oldest_age_seconds": ("gauge", {"model"}),
    "in_flight_items": ("gauge", {"model"}),
    "rejected": ("counter", {"reason"}),
    "cancelled": ("counter", set()),
    "deadline_exceeded": ("counter", set()),
    "truncated": ("counter", set()),
    "engine_restarts": ("counter", set()),
    "dropped_reports": ("counter", {"source"}),
    "fronts": ("gauge", set()),
    "device_busy_seconds": ("counter", {"engine"}),
    "device_memory_bytes": ("gauge", {"engine"}),
    "engine_heartbeat_age_seconds": ("gauge", {"engine"}),
}
"""Metrics that have series of value 0 once routes and models are registered."""


def scrape(metrics: Metrics) -> Exposition:
    return Exposition(generate_latest(metrics.registry).decode())


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics()
    metrics.register_routes(["/classify", "other"])
    metrics.register_engines(2)
    metrics.register_model("topics", "1", [0, 1, 2])
    return metrics


@pytest.mark.parametrize("name", CONTRACT)
def test_every_series_is_0_at_first(metrics: Metrics, name: str) -> None:
    kind, labels = CONTRACT[name]
    shown = scrape(metrics)
    assert shown.kinds[name] == kind
    suffix = {"counter": "_total", "histogram": "_count", "gauge": ""}[kind]
    series = shown.select(name + suffix)
    assert series
    for sample in series:
        assert set(sample.labels) == labels
        assert sample.value == 0


@pytest.mark.parametrize(
    ("name", "label", "values"),
    [
        (
            "requests_total",
            "outcome",
            {"ok", "partial", "invalid", "rejected", "timeout", "cancelled", "error"},
        ),
        ("requests_total", "route", {"/classify", "other"}),
        (
            "model_requests_total",
            "outcome",
            {"ok", "partial", "invalid", "rejected", "timeout", "cancelled", "error"},
        ),
        (
            "stage_duration_seconds_count",
            "stage",
            {"tokenize", "budget", "queue", "compute", "respond"},
        ),
        ("rejected_total", "reason", {"queue_full", "deadline", "draining", "too_large", "rate"}),
        ("items_total", "budget", {"0", "1", "2"}),
        ("batches_total", "budget", {"0", "1", "2"}),
    ],
)
def test_every_value_of_a_label_has_a_series_at_first(
    metrics: Metrics, name: str, label: str, values: set[str]
) -> None:
    assert {sample.labels[label] for sample in scrape(metrics).select(name)} == values


@pytest.mark.parametrize(
    "name",
    ["request_duration_seconds", "stage_duration_seconds", "model_request_duration_seconds"],
)
def test_durations_have_buckets_from_half_a_millisecond(metrics: Metrics, name: str) -> None:
    assert scrape(metrics).buckets(name) == DURATIONS


def test_buckets_of_heads_are_integers(metrics: Metrics) -> None:
    bounds = scrape(metrics).buckets("request_heads")
    assert bounds[0] == 0
    assert all(bound == int(bound) for bound in bounds)


def test_every_metric_has_the_prefix_and_a_help(metrics: Metrics) -> None:
    text = generate_latest(metrics.registry).decode()
    helps = [line.split(" ", 3) for line in text.splitlines() if line.startswith("# HELP")]
    assert len(helps) > 25
    for _, _, name, explanation in helps:
        assert name.startswith("budgetformer_")
        assert explanation.endswith(".")


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("model_info", {"model", "version", "labels", "layers", "heads", "device", "dtype"}),
        ("build_info", {"version", "commit", "torch"}),
        ("quality_level", {"model"}),
    ],
)
def test_info_metrics_have_their_labels(metrics: Metrics, name: str, labels: set[str]) -> None:
    gauge = getattr(metrics, name)
    gauge.labels(*sorted(labels)).set(1)
    (sample,) = scrape(metrics).select(name)
    assert set(sample.labels) == labels


@pytest.fixture
def counted(metrics: Metrics) -> Metrics:
    """Count one request of three texts, two answered at step 0 and one at step 2, traced."""
    traceparent = f"00-{TRACE}-b7ad6b7169203331-01"
    texts = [Spent(0, 0, 12, 10, 600), Spent(2, 5, 41, 300, 900), Spent(0, 0, 9, 8, 400)]
    stages = {"tokenize": 0.001, "compute": 0.004}
    counts = Counts()
    with serving(RequestContext("r", traceparent)):
        count_texts(counts, *texts, expected={0: 0.5, 1: 0.5}, stages=stages, truncated=1)
        counts.request_ended("/classify", "ok", 0.006, served=("topics", 1))
        counts.items_failed("topics", 1, 2)
    metrics.add(counts.take())
    batch = metrics.batch("topics", 2)
    assert batch is not None
    batch.count(1, 41, 0.0)
    return metrics


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heads_used_total", 5),
        ("heads_total", 24),
        ("macs_total", 318),
        ("dense_macs_total", 1900),
        ("request_heads_sum", 5),
        ("request_heads_count", 3),
        ("item_tokens_sum", 62),
        ("batches_total", 1),
        ("batch_tokens_sum", 41),
        ("stage_duration_seconds_sum", 0.005),
        ("request_duration_seconds_sum", 0.006),
        ("truncated_total", 1),
        ("model_requests_total", 1),
        ("model_request_duration_seconds_sum", 0.006),
        ("model_items_failed_total", 2),
    ],
)
def test_a_request_is_counted_once_in_each_metric(
    counted: Metrics, name: str, value: float
) -> None:
    assert scrape(counted).total(name) == pytest.approx(value)


def test_texts_are_counted_by_answering_and_expected_step(
    counted: Metrics,
) -> None:
    shown = scrape(counted)
    assert shown.by("budget", "items_total") == {"0": 2, "2": 1}
    assert shown.by("budget", "items_expected_total") == {"0": 1.5, "1": 1.5}


def test_without_calibration_the_expected_steps_are_the_actual_ones(metrics: Metrics) -> None:
    counts = Counts()
    count_texts(counts, Spent(1, 4, 5, 6, 7))
    metrics.add(counts.take())
    shown = scrape(metrics)
    assert shown.by("budget", "items_expected_total") == shown.by("budget", "items_total")


def test_cached_answers_count_no_cost(metrics: Metrics) -> None:
    counts = Counts()
    counts.looked_up("topics", 1, hits=2, misses=1)
    counts.classified(
        "topics", 1, budgets=[1, 2, 2], tokens=[5, 6, 7], heads=[4], macs=[10], dense_macs=[60],
        heads_of_one=8, expected={0: 1.0}, stages={}, truncated=0,
    )  # fmt: skip
    metrics.add(counts.take())
    shown = scrape(metrics)
    assert shown.by("budget", "items_total") == {"1": 1, "2": 2}
    assert shown.by("budget", "items_expected_total") == {"0": 3}
    assert shown.total("item_tokens_sum") == 18
    assert shown.total("cache_hits_total", model="topics", version=1) == 2
    assert shown.total("cache_misses_total", model="topics", version=1) == 1
    spent = {"request_heads_count": 1, "heads_total": 8, "macs_total": 10, "dense_macs_total": 60}
    assert {name: shown.total(name) for name in spent} == spent


def test_exemplars_name_the_trace(counted: Metrics) -> None:
    text = generate_openmetrics(counted.registry).decode()
    named = {
        sample.name
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None and sample.exemplar.labels == {"trace_id": TRACE}
    }
    assert named == {
        "budgetformer_request_duration_seconds_bucket",
        "budgetformer_model_request_duration_seconds_bucket",
        "budgetformer_stage_duration_seconds_bucket",
        "budgetformer_request_heads_bucket",
    }


def test_promtool_accepts_the_metrics(counted: Metrics) -> None:
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=generate_latest(counted.registry),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_two_registries_in_one_process_are_independent() -> None:
    first, other = Metrics(), Metrics()
    first.cancelled.inc()
    assert scrape(other).total("cancelled_total") == 0


@pytest.mark.parametrize(
    ("outcome", "refusal", "counter"),
    [
        ("cancelled", "", "cancelled_total"),
        ("timeout", "", "deadline_exceeded_total"),
        ("rejected", "queue_full", "rejected_total"),
    ],
)
def test_requests_are_counted_by_outcome(
    metrics: Metrics, outcome: str, refusal: str, counter: str
) -> None:
    counts = Counts()
    counts.request_ended("/classify", outcome, 0.1, refusal=refusal)
    metrics.add(counts.take())
    shown = scrape(metrics)
    assert shown.total(counter) == 1
    assert shown.total("requests_total", outcome=outcome) == 1


def test_each_process_reports_its_resources_under_its_name() -> None:
    pid, ended = os.getpid(), 2**22 + 1
    shown = scrape(Metrics(lambda: {"supervisor": pid, "frontend-0": pid, "engine-0": ended}))
    for name in ("cpu_seconds_total", "resident_memory_bytes", "start_time_seconds", "open_fds"):
        values = shown.by("process", f"process_{name}")
        assert set(values) == {"supervisor", "frontend-0"}
        assert all(value > 0 for value in values.values())


def series_of_models(metrics: Metrics) -> list[str]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return [line for line in lines if "model=" in line]


def test_series_of_retired_versions_are_removed(metrics: Metrics) -> None:
    counts = Counts()
    before = series_of_models(metrics)
    for number in range(2, 1002):
        version = str(number)
        metrics.register_model("topics", version, [0, 1, 2])
        count_texts(counts, Spent(2, 5, 41, 300, 900), version=number, expected={0: 1.0})
        counts.request_ended("/classify", "ok", 0.1, served=("topics", number))
        counts.items_failed("topics", number, 1)
        counts.looked_up("topics", number, hits=1, misses=1)
        difference = counts.take()
        metrics.add(difference)
        if not number % 250:
            for name in (
                "items_total", "model_requests_total", "model_items_failed_total",
                "cache_hits_total", "cache_misses_total",
            ):  # fmt: skip
                assert scrape(metrics).total(name, version=number) == 1
        metrics.forget_model("topics", version)
        metrics.add(difference)  # a late report does not bring the series back
    assert series_of_models(metrics) == before


def test_a_version_served_again_counts_from_0(metrics: Metrics) -> None:
    counts = Counts()
    counts.request_ended("/classify", "ok", 0.1, served=("topics", 1))
    metrics.add(counts.take())
    metrics.forget_model("topics", "1")
    metrics.register_model("topics", "1", [0, 1, 2])
    shown = scrape(metrics)
    assert shown.total("model_requests_total") == 0
    assert shown.total("model_request_duration_seconds_count", model="topics", version=1) == 0


def test_a_removed_model_leaves_no_series(metrics: Metrics) -> None:
    before = series_of_models(metrics)
    metrics.register_model("tags", "1", [0, 1])
    batch = metrics.batch("tags", 1)
    assert batch is not None
    batch.count(1, 41, 0.0)
    metrics.forget_model("tags", "1")
    metrics.forget_model_name("tags")
    assert metrics.batch("tags", 1) is None
    assert series_of_models(metrics) == before


def test_an_invalid_series_does_not_affect_others(metrics: Metrics) -> None:
    valid, negative = ("requests", "/classify", "ok"), ("items", "topics", "1", "0")
    unknown = {("nonsense", "label"): 1.0, (): 1.0, ("request_heads", "topics", "1"): 1.0}
    with capture_logs() as lines:
        for _ in range(3):
            metrics.add(Difference({negative: -1, ("truncated", "a", "b"): 1, valid: 1}, {}))
            metrics.add(Difference({**unknown, valid: 1}, {("requests",): Observations()}))
    assert scrape(metrics).total("requests_total", outcome="ok") == 6
    failed = ["items", "truncated", "nonsense", "", "request_heads", "requests"]
    assert [line["metric"] for line in lines] == failed


def test_a_removed_key_has_no_series(metrics: Metrics) -> None:
    counts = Counts()
    counts.texts_asked("one", 2)
    counts.request_ended("/classify", "ok", 0.1, caller="one")
    difference = counts.take()
    for names, texts in (([], {}), (["one", "two"], {"one": 2}), (["two"], {})):
        metrics.register_keys(names)
        metrics.add(difference)
        assert scrape(metrics).by("key", "key_texts_total") == texts
        assert {s.labels["key"] for s in scrape(metrics).select("key_requests_total")} == set(names)
