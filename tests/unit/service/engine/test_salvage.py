"""Failed batches are halved until each item is computed or failed; a lost device ends them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.device import DeviceLostError, check_device, probe_device
from service.engine.salvage import salvage

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True, database=None)


def usable(_: Exception) -> None:
    """Stand for a check of the device that passes, so that items caused the error."""


class Device:
    """Runs batches of numbers; the numbers in `poison` fail, and so do more than `room` at once."""

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
def test_every_item_is_computed_once_or_fails_alone(
    count: int, poison: set[int], room: int
) -> None:
    device, items = Device(poison, room), list(range(count))
    salvage(device.run, items, device.fail, usable)
    assert device.failed == sorted(poison & set(items))
    assert sorted(device.done + device.failed) == items


def test_a_failing_item_costs_two_passes_per_halving() -> None:
    device = Device({17}, 100)
    assert salvage(device.run, range(64), device.fail, usable) is None
    assert device.passes == 1 + 2 * 6


@pytest.mark.parametrize(("room", "limit"), [(64, None), (32, 32), (20, 16), (1, 1)])
def test_the_largest_batch_that_fits_into_memory_is_returned(room: int, limit: int | None) -> None:
    device = Device(set(), room)
    assert salvage(device.run, range(64), device.fail, usable) == limit
    assert device.done == list(range(64))


def test_an_item_that_does_not_fit_into_memory_fails_alone() -> None:
    device = Device(set(), 0)
    assert salvage(device.run, range(4), device.fail, usable) == 1
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
def test_errors_of_cpu_memory_are_recognized(error: Exception) -> None:
    def run(batch: Sequence[int]) -> None:
        if len(batch) > 3:
            raise error

    assert salvage(run, range(8), lambda *_: None, usable) == 2


def test_the_error_of_torchs_cpu_allocator_is_recognized() -> None:
    def run(batch: Sequence[int]) -> None:
        if len(batch) > 1:
            torch.empty(2**58, dtype=torch.uint8)

    assert salvage(run, range(2), lambda *_: None, usable) == 1


class TestLostDevice:
    """A probe shows that the device no longer computes anything."""

    @staticmethod
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nFor debugging")

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            RuntimeError("CUDA error: device-side assert triggered"),
            RuntimeError("CUDA error: unspecified launch failure"),
            RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
            torch.OutOfMemoryError("out of memory"),
            ValueError("any error that comes with it"),
        ],
    )
    def test_no_item_fails_and_nothing_is_retried(self, error: Exception) -> None:
        passes, failed = [], []

        def run(batch: Sequence[int]) -> None:
            passes.append(batch)
            raise error

        with pytest.raises(DeviceLostError, match="illegal memory access was encountered$"):
            salvage(
                run,
                range(192),
                lambda item, _: failed.append(item),
                lambda cause: check_device(self.lost, cause),
            )
        assert len(passes) == 1
        assert failed == []

    def test_the_error_does_not_repeat_the_message_of_its_cause(self) -> None:
        with pytest.raises(DeviceLostError) as caught:
            check_device(self.lost, RuntimeError("private text"))
        assert "private" not in str(caught.value)

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()])
    def test_a_probe_without_memory_is_not_a_lost_device(self, error: Exception) -> None:
        def probe() -> None:
            raise error

        check_device(probe, RuntimeError("poison"))

    def test_the_probe_of_a_working_device_passes(self) -> None:
        check_device(lambda: probe_device("cpu"), RuntimeError("poison"))
