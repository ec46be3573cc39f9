from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.buckets import MOST_BATCHES, Buckets, Entry, lane_of

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@dataclass
class Clock:
    """Time that passes only when told."""

    now: float = 0.0

    def tick(self, seconds: float = 1.0) -> float:
        self.now += seconds
        return self.now


def entry(
    item: int,
    bucket: str = "a",
    seconds: float = 0.01,
    arrived: float = 0.0,
    deadline: float = 100.0,
) -> Entry[int]:
    return Entry(item, bucket, seconds, arrived, deadline)


def drain(buckets: Buckets[int]) -> list[list[Entry[int]]]:
    batches = []
    while batch := buckets.take():
        batches.append(batch)
    return batches


@st.composite
def arrivals(draw: st.DrawFn, buckets: str = "abc") -> list[Entry[int]]:
    """Draw entries in the order of their arrival."""
    clock = Clock()
    entries = []
    for item in range(draw(st.integers(0, 30))):
        now = clock.tick(draw(st.sampled_from([0.0, 0.1, 3.0])))
        seconds = draw(st.floats(1e-6, 0.2))
        patience = draw(st.floats(0.01, 20.0))
        entries.append(entry(item, draw(st.sampled_from(buckets)), seconds, now, now + patience))
    return entries


def filled(
    entries: list[Entry[int]], batch_seconds: float = 0.2, batch_items: int = 4
) -> Buckets[int]:
    buckets: Buckets[int] = Buckets(batch_seconds, batch_items)
    for one in entries:
        buckets.add(one)
    return buckets


def urgency(one: Entry[int]) -> float:
    return one.arrived + (one.deadline - one.arrived) / 2


def test_nothing_waits_at_first() -> None:
    buckets: Buckets[int] = Buckets(0.1, 8)
    assert buckets.take() == []
    assert len(buckets) == 0
    assert buckets.seconds == 0.0
    assert buckets.oldest(now=5.0) == 0.0


@PROPERTY
@given(arrivals(), st.integers(1, 6), st.floats(0.001, 0.5))
def test_every_entry_comes_out_exactly_once(
    entries: list[Entry[int]], batch_items: int, batch_seconds: float
) -> None:
    batches = drain(filled(entries, batch_seconds, batch_items))
    assert sorted(one.item for batch in batches for one in batch) == [one.item for one in entries]


@PROPERTY
@given(arrivals())
def test_a_batch_is_of_one_bucket(entries: list[Entry[int]]) -> None:
    for batch in drain(filled(entries)):
        assert len({one.bucket for one in batch}) == 1


@PROPERTY
@given(arrivals(), st.integers(1, 6), st.floats(0.001, 0.5))
def test_a_batch_keeps_its_bounds_unless_one_item_alone_breaks_them(
    entries: list[Entry[int]], batch_items: int, batch_seconds: float
) -> None:
    for batch in drain(filled(entries, batch_seconds, batch_items)):
        assert 1 <= len(batch) <= batch_items
        most = MOST_BATCHES * batch_seconds + 1e-9
        assert len(batch) == 1 or sum(one.seconds for one in batch) <= most


@PROPERTY
@given(arrivals(), st.integers(1, 6), st.floats(0.001, 0.5))
def test_a_batch_is_as_full_as_its_bounds_allow(
    entries: list[Entry[int]], batch_items: int, batch_seconds: float
) -> None:
    buckets = filled(entries, batch_seconds, batch_items)
    waiting = {one.item: one for one in entries}
    while batch := buckets.take():
        for one in batch:
            del waiting[one.item]
        rest = [one for one in waiting.values() if one.bucket == batch[0].bucket]
        if rest and len(batch) < batch_items:
            assert sum(one.seconds for one in [*batch, rest[0]]) > batch_seconds - 1e-9


def test_where_many_wait_batches_grow_and_where_few_do_they_stay_small() -> None:
    waiting = [Entry(i, "a", 1.0, arrived=i, deadline=1000.0) for i in range(100)]
    sizes = [len(batch) for batch in drain(filled(waiting, batch_seconds=10.0, batch_items=99))]
    assert sizes == [20, 20, 15, 11, 10, 10, 10, 4]


def test_a_long_queue_of_large_requests_does_not_lengthen_small_ones_batches() -> None:
    large = [Entry(i, "a", 1.0, i, 1000.0, "bulk") for i in range(100)]
    small = [Entry(i, "a", 1.0, i, 1000.0) for i in range(12)]
    buckets = filled([*large, *small], batch_seconds=10.0, batch_items=99)
    sizes = [(batch[0].lane, len(batch)) for batch in drain(buckets)]
    assert max(size for lane, size in sizes if lane == "bulk") == 20
    assert max(size for lane, size in sizes if lane == "interactive") == 10


@PROPERTY
@given(arrivals())
def test_within_a_bucket_the_oldest_go_first(entries: list[Entry[int]]) -> None:
    order = [one for batch in drain(filled(entries)) for one in batch]
    for bucket in "abc":
        arrived = [one.arrived for one in order if one.bucket == bucket]
        assert arrived == sorted(arrived)


@PROPERTY
@given(arrivals())
def test_the_bucket_with_the_most_urgent_front_is_served(entries: list[Entry[int]]) -> None:
    buckets = filled(entries)
    waiting = list(entries)
    while batch := buckets.take():
        fronts = {one.bucket: one for one in reversed(waiting)}
        assert urgency(batch[0]) == min(map(urgency, fronts.values()))
        waiting = [one for one in waiting if one not in batch]


def test_with_equal_patience_the_oldest_entry_of_all_goes_first() -> None:
    clock = Clock()
    entries = [
        entry(i, "abc"[i % 3], arrived=clock.tick(), deadline=clock.now + 10) for i in range(9)
    ]
    assert drain(filled(entries))[0][0].item == 0


def test_a_younger_entry_that_is_about_to_be_late_goes_before_an_older_one() -> None:
    patient = entry(1, "a", arrived=0.0, deadline=60.0)
    pressed = entry(2, "b", arrived=10.0, deadline=10.5)
    assert [batch[0].item for batch in drain(filled([patient, pressed]))] == [2, 1]


def test_a_patient_entry_is_not_starved_by_a_stream_of_pressed_ones() -> None:
    clock = Clock()
    buckets = filled([entry(0, "patient", arrived=0.0, deadline=10.0)], batch_items=1)
    for item in range(1, 100):
        now = clock.tick(0.2)
        buckets.add(entry(item, "pressed", arrived=now, deadline=now + 1))
        if buckets.take()[0].item == 0:
            break
    assert clock.now < 10.0


def test_an_escalated_entry_keeps_its_place() -> None:
    clock = Clock()
    old = entry(0, "step 1", arrived=clock.tick())
    young = [entry(i, "step 4", arrived=clock.tick()) for i in (1, 2, 3)]
    buckets = filled([*young], batch_items=2)
    buckets.add(replace(old, bucket="step 4"))
    assert [one.item for batch in drain(buckets) for one in batch] == [0, 1, 2, 3]


def test_an_escalated_entry_goes_between_older_and_younger_ones() -> None:
    buckets = filled([entry(0, arrived=1.0), entry(2, arrived=3.0)])
    buckets.add(entry(1, arrived=2.0))
    assert [one.item for one in buckets.take()] == [0, 1, 2]


def test_entries_of_one_moment_keep_the_order_they_came_in() -> None:
    assert [one.item for one in filled([entry(i, arrived=1.0) for i in range(4)]).take()] == [
        0,
        1,
        2,
        3,
    ]


@PROPERTY
@given(arrivals(), st.sets(st.integers(0, 30)))
def test_remove_takes_exactly_what_is_unwanted(
    entries: list[Entry[int]], unwanted: set[int]
) -> None:
    buckets = filled(entries)
    removed = buckets.remove(lambda one: one.item in unwanted)
    assert sorted(one.item for one in removed) == [e.item for e in entries if e.item in unwanted]
    left = [one.item for batch in drain(buckets) for one in batch]
    assert sorted(left) == [e.item for e in entries if e.item not in unwanted]


@PROPERTY
@given(arrivals(), st.sets(st.integers(0, 30)), st.integers(0, 5))
def test_count_and_price_follow_what_waits(
    entries: list[Entry[int]], unwanted: set[int], taken: int
) -> None:
    buckets = filled(entries)
    waiting = {one.item: one for one in entries}
    gone = buckets.remove(lambda one: one.item in unwanted)
    for _ in range(taken):
        gone += buckets.take()
    for one in gone:
        del waiting[one.item]
    assert len(buckets) == len(waiting)
    assert buckets.seconds == pytest.approx(sum(one.seconds for one in waiting.values()), abs=1e-9)


@PROPERTY
@given(arrivals(), st.floats(0, 5))
def test_oldest_is_the_age_of_the_first_that_came(entries: list[Entry[int]], later: float) -> None:
    now = (entries[-1].arrived if entries else 0.0) + later
    expected = now - entries[0].arrived if entries else 0.0
    assert filled(entries).oldest(now) == pytest.approx(expected)


def test_an_item_dearer_than_a_whole_batch_goes_alone() -> None:
    batches = drain(filled([entry(0, seconds=9.0), entry(1), entry(2)], batch_seconds=0.1))
    assert [[one.item for one in batch] for batch in batches] == [[0], [1, 2]]


def test_an_empty_queue_has_no_price_left_over_from_rounding() -> None:
    buckets = filled([entry(i, seconds=0.1 + i * 1e-9) for i in range(1000)], batch_items=7)
    drain(buckets)
    assert buckets.seconds == 0.0


class TestLanes:
    def bulk(self, count: int, bucket: str = "a", seconds: float = 0.01) -> list[Entry[int]]:
        return [replace(entry(1000 + i, bucket, seconds), lane="bulk") for i in range(count)]

    @pytest.mark.parametrize(
        ("items", "lane"), [(1, "interactive"), (15, "interactive"), (16, "bulk"), (2048, "bulk")]
    )
    def test_large_requests_have_a_lane_of_their_own(self, items: int, lane: str) -> None:
        assert lane_of(items) == lane

    def test_a_single_text_does_not_wait_for_thousands(self) -> None:
        buckets = filled(self.bulk(2000, seconds=0.05))
        buckets.take()
        buckets.add(entry(1, "b", arrived=50.0))
        taken = [one.item for _ in range(2) for one in buckets.take()]
        assert 1 in taken

    def test_both_lanes_share_the_device_by_weight(self) -> None:
        singles = [entry(i, "a") for i in range(400)]
        buckets = filled([*singles, *self.bulk(400, "b")])
        order = [one for batch in drain(buckets) for one in batch]
        first = order[:200]
        share = sum(one.lane == "interactive" for one in first) / len(first)
        assert share == pytest.approx(4 / 5, abs=0.05)

    def test_an_idle_lane_gathers_no_credit(self) -> None:
        buckets = filled(self.bulk(1000, "b"))
        for _ in range(100):
            buckets.take()
        for item in range(100):
            buckets.add(entry(item, "a"))
        order = [one.lane for batch in drain(buckets) for one in batch][:100]
        assert "bulk" in order

    def test_a_small_batch_takes_bulk_items_along(self) -> None:
        buckets: Buckets[int] = Buckets(1.0, 100, lambda _: 0.05)
        for one in [entry(1), *self.bulk(100)]:
            buckets.add(one)
        batch = buckets.take()
        assert batch[0].item == 1
        assert sum(one.seconds for one in batch[1:]) == pytest.approx(0.05)

    def test_a_lone_lane_has_the_whole_device(self) -> None:
        assert len(filled(self.bulk(8), 1.0, 8).take()) == 8

    def test_waiting_buckets_cost_a_batch_each(self) -> None:
        buckets: Buckets[int] = Buckets(1.0, 100, lambda _: 0.5)
        for one in [entry(1), entry(2), entry(3, "b")]:
            buckets.add(one)
        assert buckets.seconds == pytest.approx(0.03 + 2 * 0.5)
