"""A priority queue from which any item can be removed."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

MIN_REBUILD = 64
"""Number of records up to which a heap is not rebuilt."""


class Heap(Generic[Item]):
    """Priority queue; items with equal keys keep the order of insertion.

    Push, pop and discard take O(log n) time (amortized). The record of a discarded item, which does
    not refer to the item, stays until it reaches the top, or until half of the records are stale
    and the heap is rebuilt. So memory is bounded.
    """

    def __init__(self) -> None:
        self._records: list[tuple[float, int]] = []
        """Keys, and the items' numbers in the order of insertion."""
        self._items: dict[int, Item] = {}
        self._numbers: dict[Item, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items.values())

    def push(self, key: float, item: Item) -> None:
        """Insert an item, which must not be in the heap."""
        number = self._next
        self._next += 1
        self._items[number] = item
        self._numbers[item] = number
        heapq.heappush(self._records, (key, number))

    def first(self) -> tuple[float, Item]:
        """Return the smallest key and its item.

        Raises:
            IndexError: the heap is empty.
        """
        records, items = self._records, self._items
        while records[0][1] not in items:
            heapq.heappop(records)
        key, number = records[0]
        return key, items[number]

    def pop(self) -> Item:
        """Remove and return the item with the smallest key.

        Raises:
            IndexError: the heap is empty.
        """
        _, item = self.first()
        _, number = heapq.heappop(self._records)
        del self._items[number], self._numbers[item]
        return item

    def discard(self, item: Item) -> bool:
        """Remove an item; return whether it was in the heap."""
        number = self._numbers.pop(item, None)
        if number is None:
            return False
        del self._items[number]
        if len(self._records) > max(2 * len(self._items), MIN_REBUILD):
            self._records = [record for record in self._records if record[1] in self._items]
            heapq.heapify(self._records)
        return True
