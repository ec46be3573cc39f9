from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.price import PriceList

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)

macs = st.integers(1, 10**12)


def test_nothing_costs_nothing() -> None:
    assert PriceList().seconds(0) == 0.0


@PROPERTY
@given(macs, macs)
def test_more_multiply_adds_never_cost_less(a: int, b: int) -> None:
    prices = PriceList()
    assert prices.seconds(min(a, b)) <= prices.seconds(max(a, b))


@PROPERTY
@given(macs, macs)
def test_items_priced_apart_or_together_cost_the_same(a: int, b: int) -> None:
    prices = PriceList()
    assert prices.seconds(a) + prices.seconds(b) == pytest.approx(prices.seconds(a + b))


@PROPERTY
@given(st.lists(st.tuples(macs, st.floats(0, 100)), max_size=40))
def test_prices_stay_positive_whatever_is_measured(batches: list[tuple[int, float]]) -> None:
    prices = PriceList()
    for work, seconds in batches:
        prices.observe(work, seconds)
        assert prices.overhead >= 0
        assert prices.seconds_per_mac >= 0
        assert prices.seconds(10**9) >= 0


@pytest.mark.parametrize("true_rate", [1e-12, 2e-11, 5e-10])
def test_the_rate_follows_what_is_measured(true_rate: float) -> None:
    prices = PriceList(seconds_per_mac=2e-11, overhead=1e-3)
    for _ in range(300):
        prices.observe(10**10, 1e-3 + 10**10 * true_rate)
    assert prices.seconds(10**10) == pytest.approx(10**10 * true_rate, rel=0.05)


def test_the_overhead_follows_small_batches() -> None:
    prices = PriceList(seconds_per_mac=2e-11, overhead=1e-3)
    for _ in range(300):
        prices.observe(1000, 2e-3)
    assert prices.overhead == pytest.approx(2e-3, rel=0.05)


def test_one_slow_batch_does_not_turn_prices_upside_down() -> None:
    prices = PriceList(seconds_per_mac=2e-11, overhead=1e-3)
    before = prices.seconds(10**9)
    prices.observe(10**9, before * 3)
    assert before < prices.seconds(10**9) < before * 1.5
