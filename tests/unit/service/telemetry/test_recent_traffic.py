"""The summary of the traffic of the last minutes."""

from __future__ import annotations

import pytest

from service.telemetry.counts import Counts
from service.telemetry.metrics import Metrics
from service.telemetry.recent_traffic import SLOTS, RecentTraffic
from tests.support.counted import Spent, count_texts

HARD = Spent(budget=4, heads=8, tokens=9, macs=80, dense_macs=100)
EASY = Spent(budget=0, heads=0, tokens=5, macs=0, dense_macs=100)


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics()
    metrics.register_routes(["/classify", "/predict"])
    for version in ("1", "2"):
        metrics.register_model("topics", version, range(5))
    return metrics


def answer(metrics: Metrics, seconds: float, *items: Spent, version: str = "1") -> None:
    counts = Counts()
    count_texts(counts, *items, version=int(version))
    counts.request_ended("/classify", "ok", seconds)
    metrics.add(counts.take())


def test_there_are_no_slots_before_the_first_interval_has_passed(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    nothing = {"model": "topics", "slots": [], "window": None}
    assert recent.report("topics") == nothing
    recent.sample(100.0)
    assert recent.report("topics") == nothing


def test_a_slot_counts_the_requests_of_its_interval_over_all_versions(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    answer(metrics, 0.004, HARD)
    recent.sample(100.0)
    answer(metrics, 0.004, HARD, EASY, EASY)
    answer(metrics, 0.004, EASY, version="2")
    recent.sample(105.0)
    (slot,) = recent.report("topics")["slots"]
    assert slot["at"] == 105
    assert slot["seconds"] == 5
    assert slot["budgets"] == {0: 3, 4: 1}
    assert slot["texts"] == 4
    assert slot["requests"] == 2
    assert slot["heads_share"] == 8 / 32
    assert slot["macs_share"] == 80 / 400


def test_a_version_served_again_counts_from_0(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    answer(metrics, 0.004, HARD, HARD, HARD)
    recent.sample(100.0)
    metrics.forget_model("topics", "1")
    metrics.register_model("topics", "1", range(5))
    answer(metrics, 0.004, HARD, EASY)
    recent.sample(105.0)
    window = recent.report("topics")["window"]
    assert window["budgets"] == {0: 1, 4: 1}
    assert window["heads_share"] == 8 / 16
    assert window["macs_share"] == 80 / 200


def test_quantiles_are_interpolated_within_their_bucket(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    recent.sample(0.0)
    for _ in range(98):
        answer(metrics, 0.0045, EASY)  # between 3 and 5 ms
    answer(metrics, 0.15, EASY)  # between 100 and 200 ms
    answer(metrics, 60.0, EASY)  # beyond the last bucket, 10 s
    recent.sample(5.0)
    (slot,) = recent.report("topics")["slots"]
    assert slot["p50_ms"] == pytest.approx(3 + 2 * 50 / 98, abs=1e-3)
    assert slot["p99_ms"] == pytest.approx(200)
    answer(metrics, 60.0, EASY)
    recent.sample(10.0)
    assert recent.report("topics")["slots"][1]["p99_ms"] == 10_000


def test_an_idle_slot_has_no_quantiles_and_no_shares(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    for now in (0.0, 5.0):
        recent.sample(now)
    (slot,) = recent.report("topics")["slots"]
    assert slot["texts"] == slot["requests"] == 0
    assert [slot[name] for name in ("p50_ms", "p99_ms", "heads_share", "macs_share")] == [None] * 4


def test_only_the_last_minutes_are_kept(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    for now in range(SLOTS + 30):
        answer(metrics, 0.004, EASY)
        recent.sample(float(now))
    told = recent.report("topics")
    assert len(told["slots"]) == SLOTS
    assert told["window"]["texts"] == sum(slot["texts"] for slot in told["slots"]) == SLOTS
    assert told["window"]["seconds"] == SLOTS


def test_a_model_loaded_later_counts_from_0(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    recent.sample(0.0)
    metrics.register_model("tags", "1", [4])
    counts = Counts()
    count_texts(counts, HARD, model="tags")
    metrics.add(counts.take())
    recent.sample(5.0)
    assert recent.report("tags")["window"]["budgets"] == {4: 1}
    assert recent.report("topics")["window"]["budgets"] == {}


def test_requests_to_other_routes_are_not_counted(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    recent.sample(0.0)
    counts = Counts()
    counts.request_ended("/predict", "ok", 0.004)
    metrics.add(counts.take())
    recent.sample(5.0)
    assert recent.report("topics")["window"]["requests"] == 0


def test_a_removed_version_is_not_subtracted(metrics: Metrics) -> None:
    recent = RecentTraffic(metrics)
    answer(metrics, 0.004, HARD, HARD)
    recent.sample(0.0)
    answer(metrics, 0.004, EASY, version="2")
    metrics.forget_model("topics", "1")
    recent.sample(5.0)
    window = recent.report("topics")["window"]
    assert window["budgets"] == {0: 1}
    assert (window["heads_share"], window["macs_share"]) == (0.0, 0.0)
