from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.salvage import salvage

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


class Device:
    """Runs batches of numbers: some are poison, and memory takes so many at once."""

    def __init__(self, poison: set[int], room: int) -> None:
        self.done: list[int] = []
        self.failed: list[int] = []
        self.passes = 0
        self._poison, self._room = poison, room

    def run(self, batch: Sequence[int]) -> None:
        self.passes += 1
        if len(batch) > self._room:
            raise torch.OutOfMemoryError("out of memory")
        if self._poison & set(batch):
            raise RuntimeError("poison")
        self.done += batch

    def fail(self, item: int, _: Exception) -> None:
        self.failed.append(item)


@PROPERTY
@given(st.integers(1, 64), st.sets(st.integers(0, 63), max_size=5), st.integers(1, 80))
def test_every_item_is_done_once_or_fails_for_itself(
    count: int, poison: set[int], room: int
) -> None:
    device, items = Device(poison, room), list(range(count))
    salvage(device.run, items, device.fail)
    assert device.failed == sorted(poison & set(items))
    assert sorted(device.done + device.failed) == items


def test_one_poisoned_item_costs_two_passes_per_halving() -> None:
    device = Device({17}, 100)
    assert salvage(device.run, range(64), device.fail) is None
    assert device.passes == 1 + 2 * 6


@pytest.mark.parametrize(("room", "found"), [(64, None), (32, 32), (20, 16), (1, 1)])
def test_what_memory_has_room_for_is_found_out(room: int, found: int | None) -> None:
    device = Device(set(), room)
    assert salvage(device.run, range(64), device.fail) == found
    assert device.done == list(range(64))


def test_an_item_that_memory_has_no_room_for_fails_alone() -> None:
    device = Device(set(), 0)
    assert salvage(device.run, range(4), device.fail) == 1
    assert device.failed == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
        ),
    ],
    ids=["MemoryError", "RuntimeError"],
)
def test_a_cpu_says_so_in_its_own_ways(error: Exception) -> None:
    def run(batch: Sequence[int]) -> None:
        if len(batch) > 3:
            raise error

    assert salvage(run, range(8), lambda *_: None) == 2


def test_what_the_allocator_really_says() -> None:
    def run(batch: Sequence[int]) -> None:
        if len(batch) > 1:
            torch.empty(2**58, dtype=torch.uint8)

    assert salvage(run, range(2), lambda *_: None) == 1
