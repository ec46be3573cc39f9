"""Buckets of waiting items, one per model version and ladder step, and batches from them.

Tokens are packed without padding, so a bucket needs no length bands: a batch of short and long
texts multiplies nothing that a batch of equal ones would not. Items of large requests wait in a
lane of their own, and the lanes share the device by weight, so that one caller's thousands of texts
do not hold up another's single one.

Urgency is the moment at which half of the time between a text's arrival and its deadline has
passed; the earlier, the more urgent. Guarantees:

- Within a lane every batch begins with the most urgent entry of the lane, whatever its bucket. The
  rest of the batch comes from the same bucket in the order of urgency. So no entry waits behind a
  less urgent one for longer than the rest of a batch.
- Of two entries, a later arrival goes first only if its deadline is the earlier one. A queue that
  could meet all deadlines when an entry was admitted therefore still can, and an entry with a long
  deadline is overtaken only by arrivals of the first half of its time: its wait is bounded.
- Across lanes urgency does not count. A lane with waiting entries gets at least the share of the
  device that its weight says, for as long as they wait; which texts are served with that share is
  decided by urgency within the lane.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from service.scheduling.heap import Heap
from service.scheduling.totals import TotalSeconds

Item = TypeVar("Item")

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


@dataclass(frozen=True, eq=False)
class Entry(Generic[Item]):
    """A waiting item.

    Attributes:
        item: what waits.
        bucket: items of one bucket can share a batch (model version, ladder step).
        seconds: its price on this device.
        arrived: when it came, on the scheduler's clock; an escalated item keeps its first arrival.
        deadline: when its answer becomes worthless.
        lane: of its request.
    """

    item: Item
    bucket: Hashable
    seconds: float
    arrived: float
    deadline: float
    lane: Lane = "interactive"

    @property
    def urgency(self) -> float:
        """The middle between arrival and deadline; the earliest goes first."""
        return (self.arrived + self.deadline) / 2


class _LaneQueue(Generic[Item]):
    """The waiting entries of one lane."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.price = TotalSeconds()
        """Price of everything that waits."""
        self.used = 0.0
        """Device seconds that the lane has had, divided by its weight."""
        self.by_bucket: dict[Hashable, Heap[Entry[Item]]] = {}

    def add(self, entry: Entry[Item]) -> None:
        heap = self.by_bucket.get(entry.bucket)
        if heap is None:
            heap = self.by_bucket[entry.bucket] = Heap()
        heap.push(entry.urgency, entry)
        self.price.add(entry.seconds)

    def discard(self, entry: Entry[Item]) -> bool:
        heap = self.by_bucket.get(entry.bucket)
        if heap is None or not heap.discard(entry):
            return False
        self.price.subtract(entry.seconds)
        if not heap:
            del self.by_bucket[entry.bucket]
        return True

    def take(self, batch: list[Entry[Item]], bucket: Hashable, limit: float, items: int) -> float:
        """Move the most urgent entries of a bucket into a batch; return their price.

        The first entry of a batch always fits; further ones up to the price `limit`, and up to
        `items` in the batch.
        """
        heap, seconds = self.by_bucket.get(bucket), 0.0
        if heap is None:
            return seconds
        while heap and len(batch) < items:
            entry = heap.first()[1]
            if batch and seconds + entry.seconds > limit:
                break
            seconds += entry.seconds
            batch.append(heap.pop())
            self.price.subtract(entry.seconds)
        if not heap:
            del self.by_bucket[bucket]
        return seconds

    def most_urgent(self) -> Hashable:
        """Return the bucket of the most urgent entry."""
        return min(self.by_bucket, key=lambda bucket: self.by_bucket[bucket].first()[0])


class Buckets(Generic[Item]):
    """Hold waiting entries and hand them out as batches.

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
        self._lanes: dict[Lane, _LaneQueue[Item]] = {
            lane: _LaneQueue(weight) for lane, weight in WEIGHTS.items()
        }
        self._items = 0

    def __len__(self) -> int:
        return self._items

    @property
    def seconds(self) -> float:
        """Device time of everything that waits, with one batch per bucket at least."""
        if not self._items:
            return 0.0
        buckets = {bucket for lane in self._lanes.values() for bucket in lane.by_bucket}
        waiting = sum(lane.price.seconds for lane in self._lanes.values())
        return waiting + sum(map(self._constant, buckets))

    def add(self, entry: Entry[Item]) -> None:
        """Add an entry to its bucket."""
        lane = self._lanes[entry.lane]
        if not lane.by_bucket:
            # A lane gains no credit while it has nothing to do.
            lane.used = max([lane.used, *(o.used for o in self._lanes.values() if o.by_bucket)])
        lane.add(entry)
        self._items += 1

    def discard(self, entry: Entry[Item]) -> bool:
        """Remove an entry (cancelled, expired); return whether it was waiting."""
        found = self._lanes[entry.lane].discard(entry)
        self._removed(found)
        return found

    def take(self) -> list[Entry[Item]]:
        """Return the next batch, most urgent entry first; empty when nothing waits.

        The lane that has had the least of its share goes first, and in it the bucket of the most
        urgent entry. A batch that is smaller than its constant cost is filled up with the other
        lane's entries of the same bucket, which then cost almost nothing.
        """
        lanes = [lane for lane in self._lanes.values() if lane.by_bucket]
        if not lanes:
            return []
        lane = min(lanes, key=lambda lane: lane.used)
        bucket = lane.most_urgent()
        batch: list[Entry[Item]] = []
        limit = min(QUEUE_SHARE * lane.price.seconds, MAX_BATCHES * self.batch_seconds)
        own = lane.take(batch, bucket, max(self.batch_seconds, limit), self.batch_items)
        constant = self._constant(bucket)
        lane.used += (own + constant) / lane.weight
        for other in lanes:
            if other is not lane and own < constant:
                extra = other.take(batch, bucket, constant, self.batch_items)
                other.used += extra / other.weight
        self._removed(len(batch))
        return batch

    def _removed(self, count: int) -> None:
        self._items -= count
        if not self._items:
            for lane in self._lanes.values():
                lane.used = 0.0  # an empty queue leaves no debts
