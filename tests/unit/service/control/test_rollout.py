"""What a roll-out measures, and when it stops."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.control.rollout import Bounds, RollOut, changed, share_bounds
from service.telemetry.counts import DURATIONS, Counts, Spent, quantile


def rollout(**bounds: float | None) -> RollOut:
    return RollOut("topics", 1, 2, weight=0.5, shadow=1.0, bounds=Bounds(**bounds))


def requests(
    counts: Counts, version: int, outcome: str = "ok", count: int = 1, seconds: float = 0.01
) -> None:
    for _ in range(count):
        counts.request_ended("/classify", outcome, seconds, served=("topics", version))


def shadowed(counts: Counts, times: float = 1.0, **outcomes: int) -> None:
    texts = sum(outcomes.values())
    spent = {
        "served": Spent(0.001 * texts, 100 * texts, 6 * texts),
        "candidate": Spent(0.001 * texts * times, 50 * texts, 3 * texts),
    }
    counts.shadowed("topics", 2, outcomes, spent)


def told(one: RollOut, counts: Counts) -> RollOut:
    one.count(counts.take())
    return one


class TestCounting:
    def test_requests_of_both_versions_and_of_no_other(self) -> None:
        counts = Counts()
        requests(counts, 1, count=5)
        requests(counts, 1, "error")
        requests(counts, 2, count=3)
        requests(counts, 2, "invalid", 7)
        requests(counts, 3, count=9)
        counts.request_ended("/classify", "ok", 0.01, served=("others", 2))
        counts.request_ended("/v1/models", "ok", 0.01)
        report = told(rollout(), counts).report()
        assert (report["served"]["requests"], report["served"]["failed_requests"]) == (6, 1)
        assert (report["candidate"]["requests"], report["candidate"]["failed_requests"]) == (3, 0)

    def test_shadow_texts_with_what_both_versions_took(self) -> None:
        counts = Counts()
        shadowed(counts, 2.0, agreed=290, differed=10)
        counts.shadowed("topics", 2, {"failed": 4, "skipped": 9}, {})
        counts.shadowed("topics", 1, {"agreed": 50}, {"candidate": Spent(9.0, 9, 9)})
        counts.shadowed("topics", 3, {"agreed": 50}, {})
        one = told(rollout(), counts)
        assert one.shadow_texts == {"agreed": 290, "differed": 10, "failed": 4, "skipped": 9}
        assert one.agreement == pytest.approx(290 / 300)
        assert one.compute_ratio == pytest.approx(2.0)
        report = one.report()
        served, candidate = report["served"], report["candidate"]
        assert (served["shadow_macs_per_text"], candidate["shadow_macs_per_text"]) == (100, 50)
        assert (served["shadow_heads_per_text"], candidate["shadow_heads_per_text"]) == (6, 3)
        assert candidate["shadow_ms_per_text"] == pytest.approx(2.0)

    def test_it_goes_on_where_it_was_after_a_restart(self) -> None:
        counts = Counts()
        requests(counts, 1, count=3)
        shadowed(counts, agreed=3)
        one = told(rollout(min_agreement=0.9), counts)
        again = msgspec.json.decode(msgspec.json.encode(one), type=RollOut)
        assert again == one
        requests(counts, 1, count=2)
        assert told(again, counts).figures["served"].requests == 5


class TestBreach:
    def test_nothing_was_counted(self) -> None:
        one = rollout(min_agreement=0.99, max_error_rate=0.0, max_latency_ratio=1.0)
        assert one.breach() == ""

    def test_a_candidate_that_fails(self) -> None:
        counts = Counts()
        requests(counts, 1, count=100)
        requests(counts, 2, "error", 20)
        assert told(rollout(), counts).breach().startswith("20 of 20 requests failed")
        assert told(rollout(max_error_rate=None), Counts()).breach() == ""

    def test_a_server_on_which_both_versions_fail(self) -> None:
        counts = Counts()
        for version in (1, 2):
            requests(counts, version, "error", 20)
        assert told(rollout(), counts).breach() == ""

    def test_few_failures_prove_nothing(self) -> None:
        counts = Counts()
        requests(counts, 1, count=100)
        requests(counts, 2, "error", 4)
        assert told(rollout(), counts).breach() == ""

    def test_shadow_texts_that_fail(self) -> None:
        counts = Counts()
        shadowed(counts, failed=20, agreed=1)
        assert told(rollout(), counts).breach().startswith("20 of 21 shadow texts failed")

    def test_answers_that_differ(self) -> None:
        counts = Counts()
        shadowed(counts, agreed=40, differed=40)
        assert "40 of 80 shadow texts" in told(rollout(min_agreement=0.95), counts).breach()
        shadowed(counts, agreed=40, differed=40)
        assert told(rollout(min_agreement=0.4), counts).breach() == ""

    @pytest.mark.parametrize(("ratio", "stops"), [(1.4, True), (1.6, False)])
    def test_a_slow_candidate(self, ratio: float, stops: bool) -> None:
        counts = Counts()
        requests(counts, 1, count=100, seconds=0.0099)
        requests(counts, 2, count=100, seconds=0.0149)
        one = told(rollout(max_latency_ratio=ratio), counts)
        assert one.latency_ratio == pytest.approx(1.5, abs=0.02)
        assert bool(one.breach()) is stops

    def test_too_few_requests_say_nothing_of_latency(self) -> None:
        counts = Counts()
        requests(counts, 1, count=100, seconds=0.001)
        requests(counts, 2, count=99, seconds=5.0)
        assert told(rollout(max_latency_ratio=1.1), counts).breach() == ""

    def test_slow_passes_for_shadow_texts(self) -> None:
        counts = Counts()
        shadowed(counts, 3.0, agreed=300)
        assert "3.00 times the compute" in told(rollout(max_latency_ratio=2.0), counts).breach()


@given(st.integers(0, 500), st.integers(1, 500))
@example(0, 17)
def test_the_share_lies_between_its_bounds(hits: int, more: int) -> None:
    count = hits + more
    low, high = share_bounds(hits, count)
    assert 0 <= low <= hits / count <= high <= 1


def test_bounds_narrow_with_what_is_seen() -> None:
    few, many = share_bounds(9, 10), share_bounds(900, 1000)
    assert few[0] < many[0] < 0.9 < many[1] < few[1]


@given(st.lists(st.sampled_from(DURATIONS), min_size=1, max_size=50))
def test_the_quantile_is_in_the_bucket_of_its_rank(values: list[float]) -> None:
    counts = Counts()
    for value in values:
        counts.request_ended("/classify", "ok", value, served=("topics", 1))
    one = told(rollout(), counts)
    rank = -(-9 * len(values) // 10)
    bound = sorted(values)[rank - 1]
    below = max((d for d in DURATIONS if d < bound), default=0.0)
    cumulative = one.figures["served"].durations.cumulative(DURATIONS)
    assert below <= quantile(cumulative, 0.9) <= bound


def test_only_what_is_given_changes() -> None:
    bounds = Bounds(min_agreement=0.9, max_latency_ratio=2.0)
    found = changed(bounds, {"min_agreement": None, "weight": 0.3, "max_error_rate": 0.2})
    assert found == Bounds(None, 0.2, 2.0)
