"""Rate and request limits of a key, shared by frontends without locks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.rate import Numbers, SharedUsage

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def numbers(count: int) -> Numbers:
    return memoryview(bytearray(8 * count)).cast("d")


def frontends(count: int) -> list[SharedUsage]:
    shared = numbers(count), numbers(count), numbers(count)
    return [SharedUsage(*shared, row) for row in range(count)]


class Key:
    """A key with a rate and a burst at several frontends."""

    def __init__(self, rate: float, burst: float, count: int = 2) -> None:
        self.rate, self.burst = rate, burst
        self.frontends = frontends(count)

    def take(self, texts: float, now: float, at: int = 0) -> float:
        return self.frontends[at].take(texts / self.rate, self.burst / self.rate, now)


class Bucket:
    """A token bucket of one process, to which the shared one must be equal."""

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate, self.burst, self.level, self.filled = rate, burst, burst, now

    def take(self, texts: float, now: float) -> float:
        self.level = min(self.burst, self.level + self.rate * (now - self.filled))
        self.filled = now
        missing = min(texts, self.burst) - self.level
        if missing <= 0:
            self.level -= texts
        return max(0.0, missing / self.rate)

    def give_back(self, texts: float) -> None:
        self.level = min(self.burst, self.level + texts)


class TestRate:
    def test_a_full_bucket_allows_its_burst_and_then_the_rate(self) -> None:
        key = Key(rate=10, burst=20)
        assert key.take(20, now=0) == 0
        assert key.take(1, now=0, at=1) == 0.1
        assert key.take(1, now=0.1, at=1) == 0
        assert abs(key.take(5, now=0.2) - 0.4) < 1e-9

    def test_refused_texts_are_not_counted(self) -> None:
        key = Key(rate=1, burst=10)
        key.take(10, now=0)
        for _ in range(100):
            assert key.take(2, now=1, at=1) == 1
        assert key.take(2, now=2) == 0

    def test_more_than_the_burst_needs_a_full_bucket_and_leaves_a_debt(self) -> None:
        key = Key(rate=10, burst=10)
        assert key.take(50, now=0) == 0
        assert abs(key.take(1, now=1, at=1) - 3.1) < 1e-9
        assert key.take(50, now=4) == 1
        assert key.take(50, now=5, at=1) == 0

    def test_a_clock_that_lags_does_not_change_the_rate(self) -> None:
        key = Key(rate=10, burst=10)
        key.take(10, now=100)
        assert key.take(1, now=99.9, at=1) > 0.1
        assert abs(key.take(1, now=100, at=1) - 0.1) < 1e-9

    def test_an_unused_key_saves_at_most_its_burst(self) -> None:
        key = Key(rate=10, burst=10, count=3)
        for now in range(100):
            assert key.take(10, now=now, at=0) == 0, "one frontend alone gets the whole rate"
        assert key.take(1, now=99, at=1) > 0
        assert key.take(10, now=1000, at=1) == 0
        assert key.take(1, now=1000, at=2) > 0

    @PROPERTY
    @given(
        st.floats(0.1, 1000),
        st.integers(1, 500),
        st.floats(0, 1e6),
        st.lists(
            st.tuples(st.floats(0, 2), st.integers(1, 800), st.integers(0, 3), st.booleans()),
            max_size=60,
        ),
    )
    def test_four_frontends_behave_like_one_bucket(
        self,
        rate: float,
        burst: int,
        start: float,
        asked: list[tuple[float, int, int, bool]],
    ) -> None:
        key, bucket, now = Key(rate, burst, count=4), Bucket(rate, burst, start), start
        for pause, texts, at, unused in asked:
            now += pause
            wait, expected = key.take(texts, now, at), bucket.take(texts, now)
            if min(wait, expected) == 0 < max(wait, expected):
                assert max(wait, expected) < 1e-6, "a difference beyond rounding"
                return
            assert abs(wait - expected) < 1e-6
            if unused and wait == 0:
                key.frontends[at].give_back(texts / rate)
                bucket.give_back(texts)

    @PROPERTY
    @given(st.data())
    def test_simultaneous_frontends_exceed_the_rate_by_one_request_each(
        self, data: st.DataObject
    ) -> None:
        # The worst case: each frontend writes only after all have read.
        count, burst = 4, 2.0
        written = [numbers(count) for _ in range(3)]
        taken = 0.0
        for now in range(200):
            snapshot = [memoryview(bytearray(column)).cast("d") for column in written]
            for row in data.draw(st.sets(st.integers(0, count - 1)), label="frontends"):
                read = [memoryview(bytearray(column)).cast("d") for column in snapshot]
                if SharedUsage(*read, row).take(1.5, burst, now) == 0:
                    taken += 1.5
                for column, changed in zip(written, read, strict=True):
                    column[row] = changed[row]
            assert taken <= burst + now + count * 1.5


class TestRequests:
    def test_the_limit_holds_over_all_frontends(self) -> None:
        first, second = frontends(2)
        assert first.begin(2)
        assert second.begin(2)
        assert not first.begin(2)
        assert not second.begin(2)
        second.end()
        assert first.begin(2)
        assert not second.begin(2)

    def test_a_lowered_limit_counts_running_requests(self) -> None:
        first, second = frontends(2)
        assert all(first.begin(None) for _ in range(3))
        assert not second.begin(3)
        assert second.begin(4)

    def test_requests_of_an_ended_frontend_are_released(self) -> None:
        requests = numbers(2)

        def release(found: Numbers) -> None:
            assert found is requests
            found[0] = 0

        dead = SharedUsage(requests, numbers(2), numbers(2), 0)
        other = SharedUsage(requests, numbers(2), numbers(2), 1, release)
        assert dead.begin(1)
        assert other.begin(1)
        assert not other.begin(1)
