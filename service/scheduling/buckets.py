"""Buckets of waiting items, one per model version and ladder step, and batches from them.

Tokens are packed without padding, so a bucket needs no length bands: a batch of short and long
texts multiplies nothing that a batch of equal ones would not. Items of large requests wait in a
lane of their own, and the lanes share the device by weight, so that one caller's thousands of texts
do not hold up another's single one.

What waits is a span: items of one request that can share a batch. They arrived together and share
a deadline, so urgency belongs to the span: it is the moment at which half of the time between
arrival and deadline has passed; the earlier, the more urgent. A batch is cut by price and by number
of items, wherever in a span that is; the rest of the span keeps its place. Guarantees:

- Within a lane every batch begins with the most urgent span of the lane, whatever its bucket. The
  rest of the batch comes from the same bucket in the order of urgency, span by span, and the items
  of a span in the order of its places. So no span waits behind a less urgent one for longer than
  the rest of a batch.
- Of two spans, a later arrival goes first only if its deadline is the earlier one. A queue that
  could meet all deadlines when a span was admitted therefore still can, and a span with a long
  deadline is overtaken only by arrivals of the first half of its time: its wait is bounded.
- Across lanes urgency does not count. A lane with waiting spans gets at least the share of the
  device that its weight says, for as long as they wait; which items are served with that share is
  decided by urgency within the lane.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

from service.scheduling.heap import Heap
from service.scheduling.totals import TotalSeconds

Owner = TypeVar("Owner")

Lane = Literal["interactive", "bulk"]
WEIGHTS: dict[Lane, float] = {"interactive": 4.0, "bulk": 1.0}
"""Shares of the device where both lanes have work."""
QUEUE_SHARE, MAX_BATCHES = 0.25, 2.0
"""In a long queue a batch may take this share of its lane's seconds, up to `MAX_BATCHES` times the
usual limit: larger batches cost less per item, which shortens the queue."""
BULK_ITEMS = 16
"""Requests with at least this many items wait in the bulk lane."""


def lane_of(items: int) -> Lane:
    """Return the lane of a request of so many items."""
    return "bulk" if items >= BULK_ITEMS else "interactive"


@dataclass(eq=False, slots=True)
class Span(Generic[Owner]):
    """Waiting items of one request that can share a batch; at least one.

    Attributes:
        owner: the request.
        places: which of the owner's items these are, in the order in which they are taken.
        prices: device seconds of each. Both lists are the span's own: `cut` shortens them.
        bucket: items of one bucket can share a batch (model version, ladder step).
        arrived: when the request came, on the scheduler's clock; an escalated item keeps its first
            arrival.
        deadline: when the request's answer becomes worthless.
        lane: of the request.
        total: sum of the prices, without drift after any number of cuts.
    """

    owner: Owner
    places: list[int]
    prices: list[float]
    bucket: Hashable
    arrived: float
    deadline: float
    lane: Lane = "interactive"
    total: TotalSeconds = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.total = TotalSeconds(self.prices)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def seconds(self) -> float:
        """Sum of the prices."""
        return self.total.seconds

    @property
    def urgency(self) -> float:
        """The middle between arrival and deadline; the earliest goes first."""
        return (self.arrived + self.deadline) / 2

    def cut(self, count: int) -> Span[Owner]:
        """Take the first `count` items off into a new span; this one keeps the rest, at least one.

        What it costs depends on `count`: the rest is neither summed again nor copied one by one.
        """
        part = replace(self, places=self.places[:count], prices=self.prices[:count])
        del self.places[:count], self.prices[:count]
        self.total -= part.total
        return part


class _LaneQueue(Generic[Owner]):
    """The waiting spans of one lane."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.items = 0
        self.price = TotalSeconds()
        """Price of everything that waits."""
        self.used = 0.0
        """Device seconds that the lane has had, divided by its weight."""
        self.by_bucket: dict[Hashable, Heap[Span[Owner]]] = {}

    def add(self, span: Span[Owner]) -> None:
        heap = self.by_bucket.get(span.bucket)
        if heap is None:
            heap = self.by_bucket[span.bucket] = Heap()
        heap.push(span.urgency, span)
        self.price += span.total
        self.items += len(span.places)

    def discard(self, span: Span[Owner]) -> bool:
        heap = self.by_bucket.get(span.bucket)
        if heap is None or not heap.discard(span):
            return False
        self.price -= span.total
        self.items -= len(span.places)
        if not heap:
            del self.by_bucket[span.bucket]
        return True

    def take(self, batch: list[Span[Owner]], bucket: Hashable, limit: float, items: int) -> float:
        """Move the most urgent items of a bucket into a batch; return their price.

        The first item of a batch always fits; further ones up to the price `limit`, and at most
        `items` in all.
        """
        heap, seconds = self.by_bucket.get(bucket), 0.0
        if heap is None:
            return seconds
        while heap and items:
            span, count = heap.first()[1], 0
            for price in span.prices:
                if count == items or ((count or batch) and seconds + price > limit):
                    break
                seconds += price
                count += 1
            if not count:
                break
            part = heap.pop() if count == len(span.prices) else span.cut(count)
            batch.append(part)
            self.price -= part.total
            self.items -= count
            items -= count
        if not heap:
            del self.by_bucket[bucket]
        return seconds

    def most_urgent(self) -> Hashable:
        """Return the bucket of the most urgent span."""
        return min(self.by_bucket, key=lambda bucket: self.by_bucket[bucket].first()[0])


class Buckets(Generic[Owner]):
    """Hold waiting spans and hand their items out as batches.

    Args:
        batch_seconds: a batch is filled up to this price (one item always fits), so that no text
            waits longer than that for a device which has just begun; in a long queue up to twice.
        batch_items: most items in a batch.
        constant: seconds that a batch of a bucket takes in addition to its items' prices.
    """

    def __init__(
        self,
        batch_seconds: float,
        batch_items: int,
        constant: Callable[[Hashable], float] = lambda _: 0.0,
    ) -> None:
        self.batch_seconds = batch_seconds
        self.batch_items = batch_items
        self._constant = constant
        self._lanes: dict[Lane, _LaneQueue[Owner]] = {
            lane: _LaneQueue(weight) for lane, weight in WEIGHTS.items()
        }

    def __len__(self) -> int:
        """Return how many items wait."""
        return sum([lane.items for lane in self._lanes.values()])

    @property
    def seconds(self) -> float:
        """Device time of everything that waits, with one batch per bucket at least."""
        if not len(self):
            return 0.0
        buckets = {bucket for lane in self._lanes.values() for bucket in lane.by_bucket}
        waiting = sum(lane.price.seconds for lane in self._lanes.values())
        return waiting + sum(map(self._constant, buckets))

    def add(self, span: Span[Owner]) -> None:
        """Add a span to its bucket."""
        lane = self._lanes[span.lane]
        if not lane.by_bucket:
            # A lane gains no credit while it has nothing to do.
            lane.used = max([lane.used, *(o.used for o in self._lanes.values() if o.by_bucket)])
        lane.add(span)

    def discard(self, span: Span[Owner]) -> bool:
        """Remove what is left of a span (cancelled, expired); return whether any of it waited."""
        found = self._lanes[span.lane].discard(span)
        self._forgive()
        return found

    def take(self) -> list[Span[Owner]]:
        """Return the next batch, most urgent span first; empty when nothing waits.

        The lane that has had the least of its share goes first, and in it the bucket of the most
        urgent span. A batch that is smaller than its constant cost is filled up with the other
        lane's items of the same bucket, which then cost almost nothing. The last span of either
        lane may be a part, cut from one whose rest keeps waiting as the same object.
        """
        lanes = [lane for lane in self._lanes.values() if lane.by_bucket]
        if not lanes:
            return []
        lane = min(lanes, key=lambda lane: lane.used)
        bucket = lane.most_urgent()
        batch: list[Span[Owner]] = []
        waiting = len(self)
        limit = min(QUEUE_SHARE * lane.price.seconds, MAX_BATCHES * self.batch_seconds)
        own = lane.take(batch, bucket, max(self.batch_seconds, limit), self.batch_items)
        constant = self._constant(bucket)
        lane.used += (own + constant) / lane.weight
        for other in lanes:
            if other is not lane and own < constant:
                room = self.batch_items - (waiting - len(self))
                extra = other.take(batch, bucket, constant, room)
                other.used += extra / other.weight
        self._forgive()
        return batch

    def _forgive(self) -> None:
        """Drop what lanes owe each other once nothing waits."""
        if not len(self):
            for lane in self._lanes.values():
                lane.used = 0.0
