"""Buckets of waiting items, one per model version and ladder step, and batches from them.

Tokens are packed without padding, so a bucket needs no length bands: a batch of short and long
texts multiplies nothing that a batch of equal ones would not. Items of large requests wait in a
lane of their own, and the lanes share the device by weight, so that one caller's thousands of texts
do not hold up another's single one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Item = TypeVar("Item")

Lane = Literal["interactive", "bulk"]
WEIGHTS: dict[Lane, float] = {"interactive": 4.0, "bulk": 1.0}
"""Shares of the device where both lanes have work."""
QUEUE_SHARE, MOST_BATCHES = 0.25, 2.0
"""Where many wait, a batch may take this share of what its lane holds, up to so many times what a
batch takes else: larger ones cost less per item, which shortens the queue."""
BULK_ITEMS = 16
"""A request of so many items waits in the bulk lane."""


def lane_of(items: int) -> Lane:
    """Return the lane of a request of so many items."""
    return "bulk" if items >= BULK_ITEMS else "interactive"


@dataclass(frozen=True)
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


class _Queues(Generic[Item]):
    """The waiting entries of one lane."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.seconds = 0.0
        """Price of all that waits."""
        self.used = 0.0
        """Device seconds that the lane has had, over its weight."""
        self.by_bucket: dict[Hashable, deque[Entry[Item]]] = {}

    def __iter__(self) -> Iterator[Entry[Item]]:
        return (entry for queue in self.by_bucket.values() for entry in queue)

    def add(self, entry: Entry[Item]) -> None:
        queue = self.by_bucket.setdefault(entry.bucket, deque())
        place = len(queue)
        while place and queue[place - 1].arrived > entry.arrived:
            place -= 1
        queue.insert(place, entry)

    def keep(self, bucket: Hashable, queue: deque[Entry[Item]]) -> None:
        if queue:
            self.by_bucket[bucket] = queue
        else:
            self.by_bucket.pop(bucket, None)

    def most_urgent(self) -> Hashable:
        return min(self.by_bucket, key=lambda bucket: _urgency(self.by_bucket[bucket][0]))


class Buckets(Generic[Item]):
    """Hold waiting entries and hand them out as batches.

    Args:
        batch_seconds: a batch is filled up to this price (one item always fits), so that nobody
            waits longer than that for a device which has just begun; where many wait, up to twice.
        batch_items: most items in a batch.
        constant: seconds that a batch of a bucket takes whatever is in it.
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
        self._lanes: dict[Lane, _Queues[Item]] = {
            lane: _Queues(weight) for lane, weight in WEIGHTS.items()
        }
        self._items = 0

    def __len__(self) -> int:
        return self._items

    @property
    def seconds(self) -> float:
        """Device time of all that waits, one batch per bucket at least."""
        if not self._items:
            return 0.0
        buckets = {bucket for lane in self._lanes.values() for bucket in lane.by_bucket}
        waiting = sum(lane.seconds for lane in self._lanes.values())
        return max(waiting, 0.0) + sum(map(self._constant, buckets))

    def oldest(self, now: float) -> float:
        """Return the age in seconds of the entry that has waited longest; 0 when none waits."""
        return max((now - e.arrived for lane in self._lanes.values() for e in lane), default=0.0)

    def add(self, entry: Entry[Item]) -> None:
        """Let an entry wait in its bucket; an older one (escalated) goes before younger ones."""
        lane = self._lanes[entry.lane]
        if not lane.by_bucket:
            # A lane gathers no credit while it has nothing to do.
            busy = [other.used for other in self._lanes.values() if other.by_bucket]
            lane.used = max([lane.used, *busy[:1]])
        lane.add(entry)
        self._count(entry, 1)

    def remove(self, unwanted: Callable[[Entry[Item]], bool]) -> list[Entry[Item]]:
        """Take out and return every entry that is unwanted (expired, cancelled)."""
        removed: list[Entry[Item]] = []
        for lane in self._lanes.values():
            for bucket, queue in list(lane.by_bucket.items()):
                kept: deque[Entry[Item]] = deque()
                for entry in queue:
                    (removed if unwanted(entry) else kept).append(entry)
                lane.keep(bucket, kept)
        for entry in removed:
            self._count(entry, -1)
        return removed

    def take(self) -> list[Entry[Item]]:
        """Return the next batch, oldest first; empty when nothing waits.

        The lane that has had the least of its share goes first. In it, the bucket is served whose
        front entry has the earliest of (arrival + half of its time to the deadline): the oldest
        goes first, unless another is about to be late. A batch that is smaller than its constant
        cost is topped up with the other lane's entries of the same bucket, which ride almost for
        nothing.
        """
        lanes = [lane for lane in self._lanes.values() if lane.by_bucket]
        if not lanes:
            return []
        lane = min(lanes, key=lambda lane: lane.used)
        bucket = lane.most_urgent()
        batch: list[Entry[Item]] = []
        most = min(QUEUE_SHARE * lane.seconds, MOST_BATCHES * self.batch_seconds)
        own = self._fill(batch, lane, bucket, max(self.batch_seconds, most))
        constant = self._constant(bucket)
        lane.used += (own + constant) / lane.weight
        for other in lanes:
            if other is not lane and own < constant:
                extra = self._fill(batch, other, bucket, constant)
                other.used += extra / other.weight
        return batch

    def _fill(
        self, batch: list[Entry[Item]], lane: _Queues[Item], bucket: Hashable, most: float
    ) -> float:
        """Move entries of a bucket into a batch, up to their price `most`; return their price."""
        queue = lane.by_bucket.get(bucket, deque())
        seconds = 0.0
        while queue and len(batch) < self.batch_items:
            if batch and seconds + queue[0].seconds > most:
                break
            entry = queue.popleft()
            seconds += entry.seconds
            batch.append(entry)
            self._count(entry, -1)
        lane.keep(bucket, queue)
        return seconds

    def _count(self, entry: Entry[Item], sign: int) -> None:
        self._items += sign
        lane = self._lanes[entry.lane]
        lane.seconds = lane.seconds + sign * entry.seconds if self._items else 0.0


def _urgency(entry: Entry[Item]) -> float:
    return entry.arrived + (entry.deadline - entry.arrived) / 2
