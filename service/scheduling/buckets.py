"""Buckets of waiting items, one per model version and ladder step, and the batches cut from them.

Tokens are packed without padding, so buckets need no length ranges. Items of large requests wait in
the bulk lane, and the lanes share the device by weight, so one caller's thousands of texts do not
delay another caller's single text.

Items wait in spans. A span holds items of one request that can share a batch. They arrived together
and have the same deadline, so urgency belongs to the span: it is the middle between arrival and
deadline, and the earliest goes first. A batch is cut by price and by number of items, also within a
span; the rest of the span keeps its urgency. Guarantees:

- Within a lane, every batch begins with the most urgent span of all buckets. The rest of the batch
  comes from the same bucket in the order of urgency, and the items of a span in the order of its
  indices. So no span waits behind a less urgent one for longer than the rest of a batch.
- Of two spans, a later arrival goes first only if its deadline is earlier. So if the queue could
  meet all deadlines when a span was admitted, it still can. Only arrivals in the first half of the
  time of a span can overtake it, so its wait is bounded.
- Urgency does not count across lanes. A lane with waiting spans gets at least its share of the
  device by weight; urgency decides which of its items are computed first.
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
"""Relative shares of the device while both lanes have work."""
QUEUE_SHARE, MAX_BATCHES = 0.25, 2.0
"""In a long queue, a batch may take this share of its lane's seconds, but at most `MAX_BATCHES`
times the usual limit. Larger batches cost less per item, which shortens the queue."""
BULK_ITEMS = 16
"""Requests with at least this many items wait in the bulk lane."""


def lane_of(items: int) -> Lane:
    """Return the lane of a request with this number of items."""
    return "bulk" if items >= BULK_ITEMS else "interactive"


@dataclass(eq=False, slots=True)
class Span(Generic[Owner]):
    """Waiting items of one request that can share a batch; at least one.

    Attributes:
        owner: the request.
        indices: indices of the items in the request, in the order in which they are computed.
        prices: device seconds of each item. `cut` shortens this list and `indices`.
        bucket: key of the bucket, such as model version and ladder step; items of one bucket can
            share a batch.
        arrived: arrival of the request, on the scheduler's clock; it does not change when items
            move on to a higher step.
        deadline: time at which the request's answer becomes worthless.
        lane: lane of the request.
        total: sum of the prices; it does not drift, however often the span is cut.
    """

    owner: Owner
    indices: list[int]
    prices: list[float]
    bucket: Hashable
    arrived: float
    deadline: float
    lane: Lane = "interactive"
    total: TotalSeconds = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.total = TotalSeconds(self.prices)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def seconds(self) -> float:
        """Sum of the prices."""
        return self.total.seconds

    @property
    def urgency(self) -> float:
        """Middle between arrival and deadline; the earliest goes first."""
        return (self.arrived + self.deadline) / 2

    def cut(self, count: int) -> Span[Owner]:
        """Move the first `count` items to a new span; at least one item must remain.

        This takes O(count) time: prices of the other items are not summed again.
        """
        part = replace(self, indices=self.indices[:count], prices=self.prices[:count])
        del self.indices[:count], self.prices[:count]
        self.total -= part.total
        return part


class _LaneQueue(Generic[Owner]):
    """The waiting spans of one lane."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.items = 0
        self.price = TotalSeconds()
        """Price of the waiting items."""
        self.used = 0.0
        """Device seconds that the lane has used, divided by its weight."""
        self.by_bucket: dict[Hashable, Heap[Span[Owner]]] = {}

    def add(self, span: Span[Owner]) -> None:
        heap = self.by_bucket.get(span.bucket)
        if heap is None:
            heap = self.by_bucket[span.bucket] = Heap()
        heap.push(span.urgency, span)
        self.price += span.total
        self.items += len(span.indices)

    def discard(self, span: Span[Owner]) -> bool:
        heap = self.by_bucket.get(span.bucket)
        if heap is None or not heap.discard(span):
            return False
        self.price -= span.total
        self.items -= len(span.indices)
        if not heap:
            del self.by_bucket[span.bucket]
        return True

    def take(self, batch: list[Span[Owner]], bucket: Hashable, limit: float, items: int) -> float:
        """Move the most urgent items of a bucket to a batch, and return their price.

        Args:
            batch: batch to extend.
            bucket: bucket to take items from.
            limit: highest total price; the first item of a batch always fits.
            items: largest number of items.
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
    """Queue of waiting spans, from which batches are taken.

    Args:
        batch_seconds: highest price of a batch, and so the longest wait for a pass that has just
            begun. One item always fits, and in a long queue a batch may cost twice as much.
        batch_items: most items in a batch.
        constant: returns the seconds that a batch of a bucket takes besides its items' prices.
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
        """Return the number of waiting items."""
        return sum([lane.items for lane in self._lanes.values()])

    @property
    def seconds(self) -> float:
        """Device time of all waiting items, assuming one batch per bucket."""
        if not len(self):
            return 0.0
        buckets = {bucket for lane in self._lanes.values() for bucket in lane.by_bucket}
        waiting = sum(lane.price.seconds for lane in self._lanes.values())
        return waiting + sum(map(self._constant, buckets))

    def add(self, span: Span[Owner]) -> None:
        """Add a span to its bucket."""
        lane = self._lanes[span.lane]
        if not lane.by_bucket:
            # A lane gains no credit while it is empty.
            lane.used = max([lane.used, *(o.used for o in self._lanes.values() if o.by_bucket)])
        lane.add(span)

    def discard(self, span: Span[Owner]) -> bool:
        """Remove the waiting rest of a span; return whether there was one."""
        discarded = self._lanes[span.lane].discard(span)
        self._reset_if_empty()
        return discarded

    def take(self) -> list[Span[Owner]]:
        """Return the next batch, most urgent span first; empty if nothing waits.

        The batch comes from the lane that has used the least of its share, and from the bucket of
        its most urgent span. If the items cost less than the constant cost of the batch, items of
        the other lane in the same bucket are added, which then cost almost nothing. The last span
        of a lane may be cut from a longer one, which keeps waiting.
        """
        lanes = [lane for lane in self._lanes.values() if lane.by_bucket]
        if not lanes:
            return []
        lane = min(lanes, key=lambda lane: lane.used)
        bucket = lane.most_urgent()
        batch: list[Span[Owner]] = []
        waiting = len(self)
        limit = min(QUEUE_SHARE * lane.price.seconds, MAX_BATCHES * self.batch_seconds)
        price = lane.take(batch, bucket, max(self.batch_seconds, limit), self.batch_items)
        constant = self._constant(bucket)
        lane.used += (price + constant) / lane.weight
        for other in lanes:
            if other is not lane and price < constant:
                room = self.batch_items - (waiting - len(self))
                extra = other.take(batch, bucket, constant, room)
                other.used += extra / other.weight
        self._reset_if_empty()
        return batch

    def _reset_if_empty(self) -> None:
        """Reset the lanes' use of the device once nothing waits."""
        if not len(self):
            for lane in self._lanes.values():
                lane.used = 0.0
