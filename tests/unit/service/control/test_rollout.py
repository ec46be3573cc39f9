"""The measurements of a roll-out, and the bounds at which it stops."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.control.rollout import Bounds, RollOut, changed, share_bounds
from service.telemetry.counts import DURATIONS, Counts, Spent, quantile


def new_rollout(**bounds: float | None) -> RollOut:
    return RollOut("topics", 1, 2, weight=0.5, shadow=1.0, bounds=Bounds(**bounds))


def add_requests(
    counts: Counts, version: int, outcome: str = "ok", count: int = 1, seconds: float = 0.01
) -> None:
    for _ in range(count):
        counts.request_ended("/classify", outcome, seconds, served=("topics", version))


def add_shadow_texts(counts: Counts, times: float = 1.0, **outcomes: int) -> None:
    texts = sum(outcomes.values())
    spent = {
        "served": Spent(0.001 * texts, 100 * texts, 6 * texts),
        "candidate": Spent(0.001 * texts * times, 50 * texts, 3 * texts),
    }
    counts.shadowed("topics", 2, outcomes, spent)


def counted(rollout: RollOut, counts: Counts) -> RollOut:
    rollout.count(counts.take())
    return rollout


class TestCounting:
    def test_requests_of_the_two_versions_are_counted(self) -> None:
        counts = Counts()
        add_requests(counts, 1, count=5)
        add_requests(counts, 1, "error")
        add_requests(counts, 2, count=3)
        add_requests(counts, 2, "invalid", 7)
        add_requests(counts, 3, count=9)
        counts.request_ended("/classify", "ok", 0.01, served=("others", 2))
        counts.request_ended("/v1/models", "ok", 0.01)
        report = counted(new_rollout(), counts).report()
        assert (report["served"]["requests"], report["served"]["failed_requests"]) == (6, 1)
        assert (report["candidate"]["requests"], report["candidate"]["failed_requests"]) == (3, 0)

    def test_shadow_texts_are_counted_with_the_cost_of_both_versions(self) -> None:
        counts = Counts()
        add_shadow_texts(counts, 2.0, agreed=290, differed=10)
        counts.shadowed("topics", 2, {"failed": 4, "skipped": 9}, {})
        counts.shadowed("topics", 1, {"agreed": 50}, {"candidate": Spent(9.0, 9, 9)})
        counts.shadowed("topics", 3, {"agreed": 50}, {})
        rollout = counted(new_rollout(), counts)
        assert rollout.shadow_texts == {"agreed": 290, "differed": 10, "failed": 4, "skipped": 9}
        assert rollout.agreement == pytest.approx(290 / 300)
        assert rollout.compute_ratio == pytest.approx(2.0)
        report = rollout.report()
        served, candidate = report["served"], report["candidate"]
        assert (served["shadow_macs_per_text"], candidate["shadow_macs_per_text"]) == (100, 50)
        assert (served["shadow_heads_per_text"], candidate["shadow_heads_per_text"]) == (6, 3)
        assert candidate["shadow_ms_per_text"] == pytest.approx(2.0)

    def test_counts_are_restored_after_a_restart(self) -> None:
        counts = Counts()
        add_requests(counts, 1, count=3)
        add_shadow_texts(counts, agreed=3)
        rollout = counted(new_rollout(min_agreement=0.9), counts)
        restored = msgspec.json.decode(msgspec.json.encode(rollout), type=RollOut)
        assert restored == rollout
        add_requests(counts, 1, count=2)
        assert counted(restored, counts).figures["served"].requests == 5


class TestBreach:
    def test_without_counts_no_bound_is_breached(self) -> None:
        rollout = new_rollout(min_agreement=0.99, max_error_rate=0.0, max_latency_ratio=1.0)
        assert rollout.breach() == ""

    def test_failed_requests_of_the_candidate_are_a_breach(self) -> None:
        counts = Counts()
        add_requests(counts, 1, count=100)
        add_requests(counts, 2, "error", 20)
        assert counted(new_rollout(), counts).breach().startswith("20 of 20 requests failed")
        assert counted(new_rollout(max_error_rate=None), Counts()).breach() == ""

    def test_failures_of_both_versions_are_not_a_breach(self) -> None:
        counts = Counts()
        for version in (1, 2):
            add_requests(counts, version, "error", 20)
        assert counted(new_rollout(), counts).breach() == ""

    def test_few_failures_are_not_a_breach(self) -> None:
        counts = Counts()
        add_requests(counts, 1, count=100)
        add_requests(counts, 2, "error", 4)
        assert counted(new_rollout(), counts).breach() == ""

    def test_failed_shadow_texts_are_a_breach(self) -> None:
        counts = Counts()
        add_shadow_texts(counts, failed=20, agreed=1)
        assert counted(new_rollout(), counts).breach().startswith("20 of 21 shadow texts failed")

    def test_low_agreement_is_a_breach(self) -> None:
        counts = Counts()
        add_shadow_texts(counts, agreed=40, differed=40)
        assert "40 of 80 shadow texts" in counted(new_rollout(min_agreement=0.95), counts).breach()
        add_shadow_texts(counts, agreed=40, differed=40)
        assert counted(new_rollout(min_agreement=0.4), counts).breach() == ""

    @pytest.mark.parametrize(("ratio", "stops"), [(1.4, True), (1.6, False)])
    def test_high_latency_is_a_breach(self, ratio: float, stops: bool) -> None:
        counts = Counts()
        add_requests(counts, 1, count=100, seconds=0.0099)
        add_requests(counts, 2, count=100, seconds=0.0149)
        rollout = counted(new_rollout(max_latency_ratio=ratio), counts)
        assert rollout.latency_ratio == pytest.approx(1.5, abs=0.02)
        assert bool(rollout.breach()) is stops

    def test_latency_is_not_judged_from_few_requests(self) -> None:
        counts = Counts()
        add_requests(counts, 1, count=100, seconds=0.001)
        add_requests(counts, 2, count=99, seconds=5.0)
        assert counted(new_rollout(max_latency_ratio=1.1), counts).breach() == ""

    def test_slow_passes_of_shadow_texts_are_a_breach(self) -> None:
        counts = Counts()
        add_shadow_texts(counts, 3.0, agreed=300)
        assert (
            "3.00 times the compute" in counted(new_rollout(max_latency_ratio=2.0), counts).breach()
        )


@given(st.integers(0, 500), st.integers(1, 500))
@example(0, 17)
def test_the_share_is_between_its_bounds(hits: int, more: int) -> None:
    count = hits + more
    low, high = share_bounds(hits, count)
    assert 0 <= low <= hits / count <= high <= 1


def test_bounds_narrow_with_the_sample() -> None:
    few, many = share_bounds(9, 10), share_bounds(900, 1000)
    assert few[0] < many[0] < 0.9 < many[1] < few[1]


@given(st.lists(st.sampled_from(DURATIONS), min_size=1, max_size=50))
def test_the_quantile_is_in_the_bucket_of_its_rank(values: list[float]) -> None:
    counts = Counts()
    for value in values:
        counts.request_ended("/classify", "ok", value, served=("topics", 1))
    rollout = counted(new_rollout(), counts)
    rank = -(-9 * len(values) // 10)
    bound = sorted(values)[rank - 1]
    below = max((d for d in DURATIONS if d < bound), default=0.0)
    cumulative = rollout.figures["served"].durations.cumulative(DURATIONS)
    assert below <= quantile(cumulative, 0.9) <= bound


def test_only_the_given_bounds_change() -> None:
    bounds = Bounds(min_agreement=0.9, max_latency_ratio=2.0)
    changes = {"min_agreement": None, "weight": 0.3, "max_error_rate": 0.2}
    assert changed(bounds, changes) == Bounds(None, 0.2, 2.0)
