"""Buckets of waiting items, one per model version and ladder step, and batches from them.

Tokens are packed without padding, so a bucket needs no length bands: a batch of short and long
texts multiplies nothing that a batch of equal ones would not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Entry(Generic[Item]):
    """A waiting item.

    Attributes:
        item: what waits.
        bucket: items of one bucket can share a batch (model version, ladder step).
        seconds: its price on this device.
        arrived: when it came, on the scheduler's clock; an escalated item keeps its first arrival.
        deadline: when its answer becomes worthless.
    """

    item: Item
    bucket: Hashable
    seconds: float
    arrived: float
    deadline: float


class Buckets(Generic[Item]):
    """Hold waiting entries and hand them out as batches.

    Args:
        batch_seconds: a batch is filled up to this price (one item always fits), so that nobody
            waits longer than that for a device which has just begun.
        batch_items: most items in a batch.
    """

    def __init__(self, batch_seconds: float, batch_items: int) -> None:
        self.batch_seconds = batch_seconds
        self.batch_items = batch_items
        self._queues: dict[Hashable, deque[Entry[Item]]] = {}
        self._seconds = 0.0
        self._items = 0

    def __len__(self) -> int:
        return self._items

    @property
    def seconds(self) -> float:
        """Price of all that waits."""
        return max(self._seconds, 0.0)

    def oldest(self, now: float) -> float:
        """Return the age in seconds of the entry that has waited longest; 0 when none waits."""
        return max((now - e.arrived for queue in self._queues.values() for e in queue), default=0.0)

    def add(self, entry: Entry[Item]) -> None:
        """Let an entry wait in its bucket; an older one (escalated) goes before younger ones."""
        queue = self._queues.setdefault(entry.bucket, deque())
        place = len(queue)
        while place and queue[place - 1].arrived > entry.arrived:
            place -= 1
        queue.insert(place, entry)
        self._count(entry, 1)

    def remove(self, unwanted: Callable[[Entry[Item]], bool]) -> list[Entry[Item]]:
        """Take out and return every entry that is unwanted (expired, cancelled)."""
        removed: list[Entry[Item]] = []
        for bucket, queue in list(self._queues.items()):
            kept: deque[Entry[Item]] = deque()
            for entry in queue:
                (removed if unwanted(entry) else kept).append(entry)
            self._replace(bucket, kept)
        for entry in removed:
            self._count(entry, -1)
        return removed

    def take(self) -> list[Entry[Item]]:
        """Return the next batch, oldest first; empty when nothing waits.

        The bucket whose front entry has the earliest of (arrival + half of its time to the
        deadline) is
        served: the oldest goes first, unless another is about to be late.
        """
        if not self._queues:
            return []
        bucket = min(self._queues, key=lambda b: _urgency(self._queues[b][0]))
        queue = self._queues[bucket]
        batch: list[Entry[Item]] = []
        seconds = 0.0
        while queue and len(batch) < self.batch_items:
            if batch and seconds + queue[0].seconds > self.batch_seconds:
                break
            entry = queue.popleft()
            seconds += entry.seconds
            batch.append(entry)
            self._count(entry, -1)
        self._replace(bucket, queue)
        return batch

    def _replace(self, bucket: Hashable, queue: deque[Entry[Item]]) -> None:
        if queue:
            self._queues[bucket] = queue
        else:
            self._queues.pop(bucket, None)

    def _count(self, entry: Entry[Item], sign: int) -> None:
        self._items += sign
        self._seconds = self._seconds + sign * entry.seconds if self._items else 0.0


def _urgency(entry: Entry[Item]) -> float:
    return entry.arrived + (entry.deadline - entry.arrived) / 2
