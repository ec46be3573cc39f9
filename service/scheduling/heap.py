"""A priority queue from which any item can be removed."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

MIN_REBUILD = 64
"""A heap of fewer items is not rebuilt."""


class Heap(Generic[Item]):
    """Hold items in the order of their keys; items with equal keys keep the order of insertion.

    Push, pop and discard take O(log n) time (amortized). A discarded item stays in the heap as a
    stale record until it comes to the front, or until half of the records are stale and the heap
    is rebuilt, so memory is bounded by twice the number of items.
    """

    def __init__(self) -> None:
        self._records: list[tuple[float, int, Item]] = []
        self._live: dict[Item, int] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._live)

    def push(self, key: float, item: Item) -> None:
        """Insert an item, which must not be in the heap."""
        number = next(self._numbers)
        self._live[item] = number
        heapq.heappush(self._records, (key, number, item))

    def first(self) -> tuple[float, Item]:
        """Return the smallest key and its item.

        Raises:
            IndexError: the heap is empty.
        """
        records, live = self._records, self._live
        while True:
            key, number, item = records[0]
            if live.get(item) == number:
                return key, item
            heapq.heappop(records)

    def pop(self) -> Item:
        """Remove and return the item with the smallest key.

        Raises:
            IndexError: the heap is empty.
        """
        live = self._live
        while True:
            _, number, item = heapq.heappop(self._records)
            if live.get(item) == number:
                del live[item]
                return item

    def discard(self, item: Item) -> bool:
        """Remove an item; return whether it was in the heap."""
        if self._live.pop(item, None) is None:
            return False
        if len(self._records) > max(2 * len(self._live), MIN_REBUILD):
            self._records = [one for one in self._records if self._live.get(one[2]) == one[1]]
            heapq.heapify(self._records)
        return True
