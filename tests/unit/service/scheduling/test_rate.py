from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.rate import TokenBucket

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def test_a_full_bucket_gives_its_burst_at_once_and_then_by_the_rate() -> None:
    bucket = TokenBucket(rate=10, burst=20)
    assert bucket.take(20, now=0) == 0
    assert bucket.take(1, now=0) == 0.1
    assert bucket.take(1, now=0.1) == 0
    assert bucket.take(5, now=0.2) == 0.4


def test_what_is_refused_takes_nothing() -> None:
    bucket = TokenBucket(rate=1, burst=10)
    bucket.take(10, now=0)
    for _ in range(100):
        assert bucket.take(2, now=1) == 1
    assert bucket.take(2, now=2) == 0


def test_more_than_the_burst_waits_for_a_full_bucket_and_leaves_a_debt() -> None:
    bucket = TokenBucket(rate=10, burst=10)
    assert bucket.take(50, now=0) == 0
    assert bucket.take(1, now=1) == 3.1
    assert bucket.take(50, now=4) == 1
    assert bucket.take(50, now=5) == 0


def test_a_clock_that_goes_back_fills_nothing() -> None:
    bucket = TokenBucket(rate=10, burst=10)
    bucket.take(10, now=100)
    assert bucket.take(1, now=50) == 0.1


@PROPERTY
@given(
    st.floats(0.1, 1000),
    st.integers(1, 500),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 800)), max_size=60),
)
def test_in_any_stretch_it_gives_no_more_than_rate_and_burst(
    rate: float, burst: int, asked: list[tuple[float, int]]
) -> None:
    bucket = TokenBucket(rate, burst)
    now, given_out, largest = 0.0, 0, 0
    for pause, count in asked:
        now += pause
        wait = bucket.take(count, now)
        if wait == 0:
            given_out += count
            largest = max(largest, count)
            assert given_out <= burst + rate * now + max(largest, burst) + 1e-6
        else:
            now += wait + 1e-9
            assert bucket.take(count, now) <= 1e-6
            given_out += count
            largest = max(largest, count)
