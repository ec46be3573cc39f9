"""The queue of an engine: batches by urgency and price, and lanes that share the device."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.admission import admit
from service.scheduling.buckets import (
    MAX_BATCHES,
    QUEUE_SHARE,
    WEIGHTS,
    Buckets,
    Lane,
    Span,
    lane_of,
)

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True, database=None)


LANES: list[Lane] = ["interactive", "bulk"]


@dataclass
class Clock:
    """A clock that tests advance."""

    now: float = 0.0

    def tick(self, seconds: float = 1.0) -> float:
        self.now += seconds
        return self.now


class Item(NamedTuple):
    """One item of a span."""

    owner: int
    index: int
    price: float
    bucket: Hashable
    urgency: float


def span(
    owner: int,
    bucket: str = "a",
    seconds: float = 0.01,
    arrived: float = 0.0,
    deadline: float = 100.0,
    lane: Lane = "interactive",
) -> Span[int]:
    """Return a span of one item."""
    return Span(owner, [0], [seconds], bucket, arrived, deadline, lane)


def items_of(spans: list[Span[int]]) -> list[Item]:
    return [
        Item(span.owner, index, price, span.bucket, span.urgency)
        for span in spans
        for index, price in zip(span.indices, span.prices, strict=True)
    ]


def owners_of(spans: list[Span[int]]) -> list[int]:
    return [item.owner for item in items_of(spans)]


def drain(buckets: Buckets[int]) -> list[list[Span[int]]]:
    batches = []
    while batch := buckets.take():
        batches.append(batch)
    return batches


PRICES = st.lists(st.floats(1e-6, 0.2) | st.just(0.1), min_size=1, max_size=6)


@st.composite
def arrivals(draw: st.DrawFn) -> list[Span[int]]:
    """Draw spans in order of arrival."""
    clock = Clock()
    spans = []
    for owner in range(draw(st.integers(0, 20))):
        now = clock.tick(draw(st.sampled_from([0.0, 0.1, 3.0])))
        prices = draw(PRICES)
        patience = draw(st.floats(0.01, 20.0))
        indices = list(range(len(prices)))
        bucket = draw(st.sampled_from("abc"))
        spans.append(Span(owner, indices, prices, bucket, now, now + patience))
    return spans


def filled(
    spans: list[Span[int]], batch_seconds: float = 0.2, batch_items: int = 4
) -> Buckets[int]:
    buckets: Buckets[int] = Buckets(batch_seconds, batch_items)
    for one in spans:
        buckets.add(one)
    return buckets


def test_a_new_queue_is_empty() -> None:
    buckets: Buckets[int] = Buckets(0.1, 8)
    assert buckets.take() == []
    assert len(buckets) == 0
    assert buckets.seconds == 0.0


@PROPERTY
@given(arrivals(), st.integers(1, 6), st.floats(0.001, 0.5))
def test_every_item_is_taken_exactly_once(
    spans: list[Span[int]], batch_items: int, batch_seconds: float
) -> None:
    items = items_of(spans)
    batches = drain(filled(spans, batch_seconds, batch_items))
    assert sorted(item for batch in batches for item in items_of(batch)) == items


@PROPERTY
@given(arrivals())
def test_a_batch_has_one_bucket(spans: list[Span[int]]) -> None:
    for batch in drain(filled(spans)):
        assert len({one.bucket for one in batch}) == 1


@PROPERTY
@given(arrivals(), st.integers(1, 6), st.floats(0.001, 0.5))
def test_a_batch_respects_its_limits_unless_one_item_alone_exceeds_them(
    spans: list[Span[int]], batch_items: int, batch_seconds: float
) -> None:
    for batch in map(items_of, drain(filled(spans, batch_seconds, batch_items))):
        assert 1 <= len(batch) <= batch_items
        limit = MAX_BATCHES * batch_seconds + 1e-9
        assert len(batch) == 1 or sum(item.price for item in batch) <= limit


@PROPERTY
@given(arrivals(), st.integers(1, 6), st.floats(0.001, 0.5))
def test_a_batch_is_as_full_as_its_limits_allow(
    spans: list[Span[int]], batch_items: int, batch_seconds: float
) -> None:
    waiting = items_of(spans)
    buckets = filled(spans, batch_seconds, batch_items)
    while batch := items_of(buckets.take()):
        waiting = [item for item in waiting if item not in batch]
        rest = [item for item in waiting if item.bucket == batch[0].bucket]
        if rest and len(batch) < batch_items:
            next_item = min(rest, key=lambda item: item.urgency)
            assert sum(item.price for item in [*batch, next_item]) > batch_seconds - 1e-9


def test_batches_grow_with_the_queue() -> None:
    waiting = [span(i, "a", 1.0, arrived=i, deadline=1000.0) for i in range(100)]
    sizes = [len(batch) for batch in drain(filled(waiting, batch_seconds=10.0, batch_items=99))]
    assert sizes == [20, 20, 15, 11, 10, 10, 10, 4]


def test_batches_of_a_lane_grow_with_the_queue_of_that_lane_only() -> None:
    large = [span(i, "a", 1.0, i, 1000.0, "bulk") for i in range(100)]
    small = [span(i, "a", 1.0, i, 1000.0) for i in range(12)]
    buckets = filled([*large, *small], batch_seconds=10.0, batch_items=99)
    sizes = [(batch[0].lane, len(batch)) for batch in drain(buckets)]
    assert max(size for lane, size in sizes if lane == "bulk") == 20
    assert max(size for lane, size in sizes if lane == "interactive") == 10


@PROPERTY
@given(arrivals())
def test_a_batch_has_the_most_urgent_item_and_the_most_urgent_of_its_bucket(
    spans: list[Span[int]],
) -> None:
    waiting = items_of(spans)
    buckets = filled(spans)
    while batch := items_of(buckets.take()):
        assert batch[0].urgency == min(item.urgency for item in waiting)
        assert [item.urgency for item in batch] == sorted(item.urgency for item in batch)
        waiting = [item for item in waiting if item not in batch]
        rest = [item.urgency for item in waiting if item.bucket == batch[0].bucket]
        assert batch[-1].urgency <= min(rest, default=float("inf"))


def test_with_equal_time_limits_the_oldest_span_is_first() -> None:
    clock = Clock()
    spans = [span(i, "abc"[i % 3], arrived=clock.tick(), deadline=clock.now + 10) for i in range(9)]
    assert drain(filled(spans))[0][0].owner == 0


def test_a_younger_span_near_its_deadline_precedes_an_older_one() -> None:
    patient = span(1, "a", arrived=0.0, deadline=60.0)
    pressed = span(2, "b", arrived=10.0, deadline=10.5)
    assert [batch[0].owner for batch in drain(filled([patient, pressed]))] == [2, 1]


def test_a_span_with_a_late_deadline_is_not_starved() -> None:
    clock = Clock()
    buckets = filled([span(0, "patient", arrived=0.0, deadline=10.0)], batch_items=1)
    for item in range(1, 100):
        now = clock.tick(0.2)
        buckets.add(span(item, "pressed", arrived=now, deadline=now + 1))
        if buckets.take()[0].owner == 0:
            break
    assert clock.now < 10.0


def test_an_escalated_span_keeps_its_age() -> None:
    clock = Clock()
    old = span(0, "step 1", arrived=clock.tick())
    young = [span(i, "step 4", arrived=clock.tick()) for i in (1, 2, 3)]
    buckets = filled([*young], batch_items=2)
    buckets.add(replace(old, bucket="step 4"))
    assert [one.owner for batch in drain(buckets) for one in batch] == [0, 1, 2, 3]


def test_an_escalated_span_is_sorted_by_its_age() -> None:
    buckets = filled([span(0, arrived=1.0), span(2, arrived=3.0)])
    buckets.add(span(1, arrived=2.0))
    assert [one.owner for one in buckets.take()] == [0, 1, 2]


def test_spans_of_equal_urgency_keep_their_order() -> None:
    batch = filled([span(i, arrived=1.0) for i in range(4)]).take()
    assert [one.owner for one in batch] == [0, 1, 2, 3]


@PROPERTY
@given(arrivals(), st.sets(st.integers(0, 20)))
def test_discard_removes_the_given_spans_only(spans: list[Span[int]], unwanted: set[int]) -> None:
    wanted = [item for item in items_of(spans) if item.owner not in unwanted]
    buckets = filled(spans)
    assert all(buckets.discard(one) for one in spans if one.owner in unwanted)
    assert not any(buckets.discard(one) for one in spans if one.owner in unwanted)
    assert sorted(item for batch in drain(buckets) for item in items_of(batch)) == wanted
    assert not any(map(buckets.discard, spans))


def test_the_rest_of_a_cut_span_waits_and_can_be_discarded() -> None:
    whole = Span(0, [5, 6, 7, 8], [0.1, 0.2, 0.3, 0.4], "a", 0.0, 100.0)
    buckets = filled([whole], batch_seconds=10.0, batch_items=1)
    (part,) = buckets.take()
    assert (part.indices, part.prices, part.seconds) == ([5], [0.1], 0.1)
    assert (whole.indices, whole.prices, whole.seconds) == ([6, 7, 8], [0.2, 0.3, 0.4], 0.9)
    assert len(buckets) == 3
    assert not buckets.discard(part)
    assert buckets.discard(whole)
    assert len(buckets) == 0
    assert buckets.seconds == 0.0


def test_the_rest_of_a_cut_span_precedes_spans_of_equal_urgency() -> None:
    spans = [Span(owner, [0, 1], [0.01, 0.01], "a", 0.0, 100.0) for owner in (0, 1)]
    batches = drain(filled(spans, batch_items=3))
    assert list(map(owners_of, batches)) == [[0, 0, 1], [1]]


CONSTANTS: dict[Hashable, float] = {"a": 0.01, "b": 0.2, "c": 3.0}


class Reference:
    """A simple queue of single items, which must give the same batches.

    Prices are multiples of 2 ** -9 seconds, so their sums are exact in any order.
    """

    def __init__(self, batch_seconds: float, batch_items: int) -> None:
        self.batch_seconds = batch_seconds
        self.batch_items = batch_items
        self.waiting: dict[Lane, dict[Hashable, list[Item]]] = {lane: {} for lane in LANES}
        self.used = dict.fromkeys(LANES, 0.0)

    def items(self, lane: Lane) -> list[Item]:
        return [item for items in self.waiting[lane].values() for item in items]

    def seconds(self) -> float:
        buckets = {bucket for lane in LANES for bucket in self.waiting[lane]}
        prices = [item.price for lane in LANES for item in self.items(lane)]
        return sum(prices) + sum(CONSTANTS[bucket] for bucket in buckets)

    def add(self, one: Span[int]) -> None:
        if not self.waiting[one.lane]:
            busy = [self.used[lane] for lane in LANES if self.waiting[lane]]
            self.used[one.lane] = max([self.used[one.lane], *busy])
        items = self.waiting[one.lane].setdefault(one.bucket, [])
        items.extend(items_of([one]))
        items.sort(key=lambda item: item.urgency)

    def discard(self, owner: int) -> None:
        for lane in LANES:
            for item in self.items(lane):
                if item.owner == owner:
                    self.remove(lane, item)

    def remove(self, lane: Lane, item: Item) -> None:
        self.waiting[lane][item.bucket].remove(item)
        if not self.waiting[lane][item.bucket]:
            del self.waiting[lane][item.bucket]
        if not any(self.waiting.values()):
            self.used = dict.fromkeys(LANES, 0.0)

    def take(self) -> list[Item]:
        lanes = [lane for lane in LANES if self.waiting[lane]]
        if not lanes:
            return []
        lane = min(lanes, key=self.used.__getitem__)
        firsts = [items[0] for items in self.waiting[lane].values()]
        bucket = min(firsts, key=lambda item: item.urgency).bucket
        constant = CONSTANTS[bucket]
        queue = sum(item.price for item in self.items(lane))
        limit = min(QUEUE_SHARE * queue, MAX_BATCHES * self.batch_seconds)
        batch = self.fit(lane, bucket, max(self.batch_seconds, limit), [])
        price = sum(item.price for item in batch)
        self.used[lane] += (price + constant) / WEIGHTS[lane]
        taken = [(lane, item) for item in batch]
        for other in lanes:
            if other != lane and price < constant:
                extra = self.fit(other, bucket, constant, batch)
                self.used[other] += sum(item.price for item in extra) / WEIGHTS[other]
                taken += [(other, item) for item in extra]
        for lane, item in taken:
            self.remove(lane, item)
        return [item for _, item in taken]

    def fit(self, lane: Lane, bucket: Hashable, limit: float, batch: list[Item]) -> list[Item]:
        """Return the items of a lane's bucket that fit into a batch with its present items."""
        fitting: list[Item] = []
        for item in self.waiting[lane].get(bucket, []):
            exceeds = sum(other.price for other in [*fitting, item]) > limit
            if len(batch) + len(fitting) == self.batch_items or (exceeds and batch + fitting):
                break
            fitting.append(item)
        return fitting


@PROPERTY
@given(st.data(), st.integers(1, 12), st.integers(1, 256))
def test_batches_equal_those_of_a_simple_queue(
    data: st.DataObject, batch_items: int, batch_price: int
) -> None:
    buckets: Buckets[int] = Buckets(batch_price / 512, batch_items, CONSTANTS.__getitem__)
    reference = Reference(batch_price / 512, batch_items)
    spans: list[Span[int]] = []
    prices = st.integers(1, 128).map(lambda price: price / 512)
    for owner in range(data.draw(st.integers(1, 40), "operations")):
        match data.draw(st.sampled_from(["add", "add", "discard", "take"])):
            case "add":
                drawn = data.draw(st.lists(prices, min_size=1, max_size=20))
                deadline, bucket = data.draw(st.integers(1, 4)), data.draw(st.sampled_from("bc"))
                lane = data.draw(st.sampled_from(LANES))
                one = Span(owner, list(range(len(drawn))), drawn, bucket, 0.0, deadline, lane)
                spans.append(one)
                reference.add(one)
                buckets.add(one)
            case "discard" if spans:
                one = spans.pop(data.draw(st.integers(0, len(spans) - 1)))
                buckets.discard(one)
                reference.discard(one.owner)
            case "take":
                assert items_of(buckets.take()) == reference.take()
        assert len(buckets) == sum(len(reference.items(lane)) for lane in LANES)
        assert buckets.seconds == pytest.approx(reference.seconds(), abs=1e-12)
    while batch := items_of(buckets.take()):
        assert batch == reference.take()
    assert not reference.take()


@PROPERTY
@given(st.data())
def test_length_and_seconds_equal_the_waiting_items_after_any_sequence(data: st.DataObject) -> None:
    buckets: Buckets[int] = Buckets(0.2, 4, CONSTANTS.__getitem__)
    waiting: list[Span[int]] = []
    for owner in range(data.draw(st.integers(0, 60), "operations")):
        match data.draw(st.sampled_from(["add", "add", "discard", "take"])):
            case "add":
                prices = data.draw(st.lists(st.floats(0, 1e4), min_size=1, max_size=9))
                deadline, bucket = data.draw(st.floats(0, 1e3)), data.draw(st.sampled_from("abc"))
                lane = data.draw(st.sampled_from(LANES))
                indices = list(range(len(prices)))
                waiting.append(Span(owner, indices, prices, bucket, 0.0, deadline, lane))
                buckets.add(waiting[-1])
            case "discard" if waiting:
                buckets.discard(waiting.pop(data.draw(st.integers(0, len(waiting) - 1))))
            case "take":
                taken = buckets.take()
                waiting = [one for one in waiting if one not in taken]
        rebuilt: Buckets[int] = Buckets(0.2, 4, CONSTANTS.__getitem__)
        for one in waiting:
            rebuilt.add(replace(one))
        assert len(buckets) == sum(map(len, waiting))
        assert buckets.seconds == rebuilt.seconds  # exact, without rounding errors
        prices = [price for one in waiting for price in one.prices]
        constants = sum(CONSTANTS[bucket] for bucket in {one.bucket for one in waiting})
        assert buckets.seconds == pytest.approx(sum(prices) + constants, abs=1e-6)


def test_an_item_above_the_price_of_a_batch_is_a_batch() -> None:
    batches = drain(filled([span(0, seconds=9.0), span(1), span(2)], batch_seconds=0.1))
    assert [[one.owner for one in batch] for batch in batches] == [[0], [1, 2]]


def test_an_empty_queue_has_exactly_zero_seconds() -> None:
    buckets = filled([span(i, seconds=0.1 + i * 1e-10) for i in range(1000)], batch_items=7)
    drain(buckets)
    assert buckets.seconds == 0.0


class TestStarvation:
    """In virtual time, in which a batch takes its price."""

    @staticmethod
    def serve(
        buckets: Buckets[int], arrivals: list[Span[int]], until: float = 1e9
    ) -> dict[int, float]:
        """Serve spans as they arrive, and return when each was done, except expired ones."""
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
                done[one.owner] = clock.now
        return done

    @staticmethod
    def stream(bucket: str, seconds: float, patience: float, first: int = 1000) -> list[Span[int]]:
        """Return texts of one bucket that load the device by 110 %."""
        gap = seconds / 1.1
        return [
            span(first + i, bucket, seconds, i * gap, i * gap + patience)
            for i in range(int(30 / gap))
        ]

    def test_short_deadlines_do_not_wait_for_a_long_one_in_their_bucket(self) -> None:
        long = span(0, "a", 0.02, 0.0, 600.0)
        short = [span(i, "a", 0.02, 0.001 * i, 0.001 * i + 10.0) for i in range(1, 6)]
        done = self.serve(filled([]), [long, *short, *self.stream("b", 0.02, 10.0)], until=12.0)
        assert all(done[one.owner] < 1.0 for one in short)

    @pytest.mark.parametrize("bucket", ["a", "b"])
    def test_a_long_deadline_is_served_among_endless_short_ones(self, bucket: str) -> None:
        long = span(0, bucket, 0.02, 0.0, 40.0)
        done = self.serve(filled([]), [long, *self.stream("b", 0.02, 10.0)])
        # Only texts of its first 15 s overtake it, of which at most 1.5 s of work are left then.
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
        """A text is admitted if the queue and its own price fit its deadline."""
        draw, clock, limit = random.Random(seed), Clock(), 0.05
        buckets: Buckets[int] = Buckets(limit, 8)
        slack = (len(names) + 1) * limit  # the running batch, and less urgent parts of others
        waiting: dict[int, Span[int]] = {}
        arrived = 0.0
        for item in range(300):
            price, patience = draw.uniform(0.001, 0.03), draw.choice(patiences)
            arrived += draw.expovariate(1.0) * 0.0155 / load
            while waiting and clock.now < arrived:
                for ran in buckets.take():
                    clock.tick(ran.seconds)
                    del waiting[ran.owner]
                assert all(one.deadline >= clock.now for one in waiting.values())
            clock.now = max(clock.now, arrived)
            left = arrived + patience - clock.now - slack
            if admit(1, len(buckets), 4096, buckets.seconds, price, left) is None:
                one = span(item, draw.choice(names), price, arrived, arrived + patience)
                buckets.add(one)
                waiting[item] = one
        while batch := buckets.take():
            for ran in batch:
                assert clock.tick(ran.seconds) <= ran.deadline


class TestLanes:
    def bulk(self, count: int, bucket: str = "a", seconds: float = 0.01) -> list[Span[int]]:
        return [replace(span(1000 + i, bucket, seconds), lane="bulk") for i in range(count)]

    @pytest.mark.parametrize(
        ("items", "lane"), [(1, "interactive"), (15, "interactive"), (16, "bulk"), (2048, "bulk")]
    )
    def test_large_requests_use_the_bulk_lane(self, items: int, lane: str) -> None:
        assert lane_of(items) == lane

    def test_a_single_text_overtakes_thousands_of_bulk_texts(self) -> None:
        buckets = filled(self.bulk(2000, seconds=0.05))
        buckets.take()
        buckets.add(span(1, "b", arrived=50.0))
        taken = [one.owner for _ in range(2) for one in buckets.take()]
        assert 1 in taken

    def test_lanes_share_the_device_by_weight(self) -> None:
        singles = [span(i, "a") for i in range(400)]
        buckets = filled([*singles, *self.bulk(400, "b")])
        order = [one for batch in drain(buckets) for one in batch]
        first = order[:200]
        share = sum(one.lane == "interactive" for one in first) / len(first)
        assert share == pytest.approx(4 / 5, abs=0.05)

    def test_an_idle_lane_gains_no_credit(self) -> None:
        buckets = filled(self.bulk(1000, "b"))
        for _ in range(100):
            buckets.take()
        for item in range(100):
            buckets.add(span(item, "a"))
        order = [one.lane for batch in drain(buckets) for one in batch][:100]
        assert "bulk" in order

    def test_a_lane_alone_on_the_device_accumulates_no_debt(self) -> None:
        buckets = filled([], 0.05, 256)
        for one in self.bulk(1000, seconds=0.05):
            buckets.add(one)
            buckets.take()
        for item in range(100):
            buckets.add(span(item, "a", seconds=0.05))
        buckets.add(self.bulk(1)[0])
        lanes = [one.lane for batch in drain(buckets) for one in batch]
        assert lanes.index("bulk") <= 8

    def test_the_share_of_a_lane_does_not_depend_on_deadlines(self) -> None:
        pressed = [span(i, "a", 0.01, 0.0, 0.1) for i in range(400)]
        patient = [span(1000 + i, "b", 0.01, 0.0, 600.0, "bulk") for i in range(100)]
        order = [one.lane for batch in drain(filled([*pressed, *patient])) for one in batch]
        assert order[:250].count("bulk") == pytest.approx(50, abs=5)

    def test_a_small_batch_is_filled_with_bulk_items(self) -> None:
        buckets: Buckets[int] = Buckets(1.0, 100, lambda _: 0.05)
        for one in [span(1), *self.bulk(100)]:
            buckets.add(one)
        batch = buckets.take()
        assert batch[0].owner == 1
        assert sum(one.seconds for one in batch[1:]) == pytest.approx(0.05)

    def test_bulk_items_that_fill_a_batch_are_cut_from_their_span(self) -> None:
        buckets: Buckets[int] = Buckets(1.0, 5, lambda _: 1.0)
        for one in [
            Span(1, [0, 1, 2], [0.01] * 3, "a", 0.0, 100.0),
            Span(2, list(range(20)), [0.01] * 20, "a", 0.0, 100.0, "bulk"),
        ]:
            buckets.add(one)
        assert owners_of(buckets.take()) == [1, 1, 1, 2, 2]
        assert len(buckets) == 18

    def test_a_single_lane_has_the_whole_device(self) -> None:
        assert len(filled(self.bulk(8), 1.0, 8).take()) == 8

    def test_each_waiting_bucket_adds_the_constant_of_a_batch(self) -> None:
        buckets: Buckets[int] = Buckets(1.0, 100, lambda _: 0.5)
        for one in [span(1), span(2), span(3, "b")]:
            buckets.add(one)
        assert buckets.seconds == pytest.approx(0.03 + 2 * 0.5)
