from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.admission import admit
from service.scheduling.buckets import MAX_BATCHES, Buckets, Entry, Lane, lane_of

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


LANES: list[Lane] = ["interactive", "bulk"]


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


def test_nothing_waits_at_first() -> None:
    buckets: Buckets[int] = Buckets(0.1, 8)
    assert buckets.take() == []
    assert len(buckets) == 0
    assert buckets.seconds == 0.0


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
        most = MAX_BATCHES * batch_seconds + 1e-9
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
            following = min(rest, key=lambda one: one.urgency)
            assert sum(one.seconds for one in [*batch, following]) > batch_seconds - 1e-9


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
def test_a_batch_holds_the_most_urgent_entries_of_its_bucket_and_begins_with_that_of_all(
    entries: list[Entry[int]],
) -> None:
    buckets = filled(entries)
    waiting = list(entries)
    while batch := buckets.take():
        assert batch[0].urgency == min(one.urgency for one in waiting)
        assert [one.urgency for one in batch] == sorted(one.urgency for one in batch)
        waiting = [one for one in waiting if one not in batch]
        rest = [one.urgency for one in waiting if one.bucket == batch[0].bucket]
        assert batch[-1].urgency <= min(rest, default=float("inf"))


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
def test_discard_takes_exactly_what_is_unwanted(
    entries: list[Entry[int]], unwanted: set[int]
) -> None:
    buckets = filled(entries)
    assert all(buckets.discard(one) for one in entries if one.item in unwanted)
    assert not any(buckets.discard(one) for one in entries if one.item in unwanted)
    left = [one.item for batch in drain(buckets) for one in batch]
    assert sorted(left) == [e.item for e in entries if e.item not in unwanted]
    assert not any(map(buckets.discard, entries))


@PROPERTY
@given(st.data())
def test_count_and_price_are_those_of_what_waits_after_any_sequence(data: st.DataObject) -> None:
    buckets: Buckets[int] = Buckets(0.2, 4, {"a": 0.01, "b": 0.2, "c": 3.0}.__getitem__)  # type: ignore[arg-type]
    waiting: list[Entry[int]] = []
    for item in range(data.draw(st.integers(0, 60), "operations")):
        match data.draw(st.sampled_from(["add", "add", "discard", "take"])):
            case "add":
                seconds, lane = data.draw(st.floats(0, 1e4)), data.draw(st.sampled_from(LANES))
                deadline, bucket = data.draw(st.floats(0, 1e3)), data.draw(st.sampled_from("abc"))
                waiting.append(Entry(item, bucket, seconds, 0.0, deadline, lane))
                buckets.add(waiting[-1])
            case "discard" if waiting:
                buckets.discard(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
            case "take":
                taken = buckets.take()
                waiting = [one for one in waiting if one not in taken]
        again: Buckets[int] = Buckets(0.2, 4, buckets._constant)
        for one in waiting:
            again.add(one)
        assert len(buckets) == len(waiting)
        assert buckets.seconds == again.seconds  # exactly: nothing drifts
        prices = sum(one.seconds for one in waiting)
        constants = sum(map(buckets._constant, {one.bucket for one in waiting}))
        assert buckets.seconds == pytest.approx(prices + constants, abs=1e-6)


def test_an_item_dearer_than_a_whole_batch_goes_alone() -> None:
    batches = drain(filled([entry(0, seconds=9.0), entry(1), entry(2)], batch_seconds=0.1))
    assert [[one.item for one in batch] for batch in batches] == [[0], [1, 2]]


def test_an_empty_queue_has_no_price_left_over_from_rounding() -> None:
    buckets = filled([entry(i, seconds=0.1 + i * 1e-10) for i in range(1000)], batch_items=7)
    drain(buckets)
    assert buckets.seconds == 0.0


class TestStarvation:
    """In virtual time: a batch takes its price."""

    @staticmethod
    def serve(
        buckets: Buckets[int], arrivals: list[Entry[int]], until: float = 1e9
    ) -> dict[int, float]:
        """Serve entries as they arrive; return when each was done, expired ones left out."""
        clock, done = Clock(), {}
        coming = sorted(arrivals, key=lambda one: one.arrived)
        while (coming or len(buckets)) and clock.now < until:
            if not len(buckets):
                clock.now = max(clock.now, coming[0].arrived)
            while coming and coming[0].arrived <= clock.now:
                buckets.add(coming.pop(0))
            batch = buckets.take()
            for one in [one for one in batch if one.deadline > clock.now]:
                clock.tick(one.seconds)
                done[one.item] = clock.now
        return done

    @staticmethod
    def stream(bucket: str, seconds: float, patience: float, first: int = 1000) -> list[Entry[int]]:
        """Return texts of one bucket that ask for a tenth more than the device can do."""
        gap = seconds / 1.1
        return [
            Entry(first + i, bucket, seconds, i * gap, i * gap + patience)
            for i in range(int(30 / gap))
        ]

    def test_short_deadlines_do_not_wait_behind_a_long_one_of_their_bucket(self) -> None:
        long = Entry(0, "a", 0.02, 0.0, 600.0)
        short = [Entry(i, "a", 0.02, 0.001 * i, 0.001 * i + 10.0) for i in range(1, 6)]
        done = self.serve(filled([]), [long, *short, *self.stream("b", 0.02, 10.0)], until=12.0)
        assert all(done[one.item] < 1.0 for one in short)

    @pytest.mark.parametrize("bucket", ["a", "b"])
    def test_a_long_deadline_does_not_wait_for_ever_beside_endless_short_ones(
        self, bucket: str
    ) -> None:
        long = Entry(0, bucket, 0.02, 0.0, 40.0)
        done = self.serve(filled([]), [long, *self.stream("b", 0.02, 10.0)])
        # It is overtaken by arrivals of its first 15 s only, of which at most 1.5 s are left then.
        assert done[0] < 20.0

    @settings(PROPERTY, max_examples=40)
    @given(
        st.integers(0, 2**32),
        st.sampled_from(["a", "ab", "abc"]),
        st.sampled_from([0.9, 1.1, 2.0]),
        st.lists(st.sampled_from([0.6, 1.0, 2.0, 10.0, 600.0]), min_size=1, unique=True),
    )
    def test_no_admitted_text_expires(
        self, seed: int, names: str, load: float, patiences: list[float]
    ) -> None:
        """A text of one lane is admitted if what waits and its own price fit its deadline."""
        draw, clock, limit = random.Random(seed), Clock(), 0.05
        buckets: Buckets[int] = Buckets(limit, 8)
        slack = (len(names) + 1) * limit  # a batch that runs, and the less urgent rest of others
        waiting: dict[int, Entry[int]] = {}
        arrived = 0.0
        for item in range(300):
            price, patience = draw.uniform(0.001, 0.03), draw.choice(patiences)
            arrived += draw.expovariate(1.0) * 0.0155 / load
            while waiting and clock.now < arrived:
                for ran in buckets.take():
                    clock.tick(ran.seconds)
                    del waiting[ran.item]
                assert all(one.deadline >= clock.now for one in waiting.values())
            clock.now = max(clock.now, arrived)
            left = arrived + patience - clock.now - slack
            if admit(1, len(buckets), 4096, buckets.seconds, price, left) is None:
                one = Entry(item, draw.choice(names), price, arrived, arrived + patience)
                buckets.add(one)
                waiting[item] = one
        while batch := buckets.take():
            for ran in batch:
                assert clock.tick(ran.seconds) <= ran.deadline


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

    def test_a_lane_that_had_the_device_alone_does_not_owe_for_it(self) -> None:
        buckets = filled([], 0.05, 256)
        for one in self.bulk(1000, seconds=0.05):
            buckets.add(one)
            buckets.take()
        for item in range(100):
            buckets.add(entry(item, "a", seconds=0.05))
        buckets.add(self.bulk(1)[0])
        lanes = [one.lane for batch in drain(buckets) for one in batch]
        assert lanes.index("bulk") <= 8

    def test_each_lane_gets_its_share_whatever_the_deadlines_of_the_other(self) -> None:
        pressed = [Entry(i, "a", 0.01, 0.0, 0.1) for i in range(400)]
        patient = [Entry(1000 + i, "b", 0.01, 0.0, 600.0, "bulk") for i in range(100)]
        order = [one.lane for batch in drain(filled([*pressed, *patient])) for one in batch]
        assert order[:250].count("bulk") == pytest.approx(50, abs=5)

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
